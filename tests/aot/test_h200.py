"""The GPU kernels compiled ahead of time for an H200, on a machine without one.

Outside of CI: it needs JAX's CUDA packages (4 GB) and a file that describes the target. To run it:

    pip install -e '.[cuda,test]'
    KVJAX_H200_TARGET=h200_target_config.txtpb JAX_PLATFORMS=cpu \\
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 pytest -n 0 tests/aot/test_h200.py

The file is the text of `jax._src.lib.xla_client.get_topology_for_devices(jax.devices())`'s
`target_config`, taken on a machine with the GPU. `MOSAIC_GPU_DUMP_PTXAS=1` and
`MOSAIC_GPU_DUMP_TO=FOLDER` (which must exist) add what the assembler says of registers and spills.
"""

import functools
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kvjax.cache import KVPool
from kvjax.pallas_kernels.few_rows import gated_product, product
from kvjax.pallas_kernels.page_attention import Items, WorkList, page_attention, prepare
from kvjax.pallas_kernels.window_scores import window_scores

TARGET = os.environ.get("KVJAX_H200_TARGET", "")
pytestmark = pytest.mark.skipif(not TARGET, reason="KVJAX_H200_TARGET names no target file")


@pytest.fixture(scope="module")
def placed():
    """Makes the type of an array on an H200."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=Path(TARGET).read_text(), topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])

    def place(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return place


def arguments(place, *, queries=64, heads=32, kv_heads=8, dim=128, page_size=16, per_page=None,
              tracked=False, classes=((64, 1, 128),)):  # fmt: skip
    per_page = per_page or kv_heads
    shape, groups = (1000, 4, per_page, page_size, dim), kv_heads // per_page
    pool = KVPool(
        k=place(shape, jnp.bfloat16), v=place(shape, jnp.bfloat16),
        position=place((1000, page_size)) if tracked else None,
    )  # fmt: skip
    work = WorkList(
        items=tuple(
            Items(index=place((n, 5)), count=place(()), max_queries=q, max_pages=p)
            for n, q, p in classes
        ),
        pages=place((1, groups, 64, 512)),
        length=place((1, groups, 64)),
        query_position=place((queries,)),
    )
    return place((queries, heads, dim), jnp.bfloat16), pool, work


@pytest.mark.parametrize(
    "sizes, options",
    [
        ({}, {}),
        ({"dim": 64}, {"soft_cap": 30.0}),
        ({"heads": 8, "page_size": 64}, {}),
        ({"dim": 80}, {}),
        ({"dim": 96, "queries": 512, "classes": ((80, 32, 128),)}, {}),
        ({"dim": 256}, {}),
        ({"heads": 128, "page_size": 8}, {}),
        ({"per_page": 1, "page_size": 128}, {}),
        ({"queries": 512, "classes": ((64, 1, 128), (80, 32, 128))}, {}),
        ({"heads": 28, "kv_heads": 4, "classes": ((4, 64, 16),)}, {"window": True}),
        ({"tracked": True, "queries": 512, "classes": ((64, 1, 128), (80, 32, 128))}, {}),
        ({"tracked": True, "dim": 64, "page_size": 64}, {"window": True}),
    ],
)
def test_compiles(placed, sizes, options):
    """Nothing is copied: what is allocated besides are the partial results and the plan."""
    q, pool, work = arguments(placed, **sizes)
    windowed = options.pop("window", False)

    def attend(q, pool, layer, work, window):
        window = window if windowed else None
        return page_attention(q, pool, layer, work, window=window, implementation="gpu", **options)

    scalar = placed(())
    lowered = jax.jit(attend).trace(q, pool, scalar, work, scalar)
    memory = lowered.lower(lowering_platforms=("cuda",)).compile().memory_analysis()
    places = sum(items.index.shape[0] * items.max_queries for items in work.items)
    partials = places * q.shape[1] * (q.shape[2] + 1) * 4
    table = work.pages.shape  # and what the plan looks up of positions
    places = math.prod(table) * pool.k.shape[3] * 8 * (pool.position is not None)
    assert memory.temp_size_in_bytes < partials + places + 2**20


def test_a_scan_over_layers_copies_nothing(placed):
    """As the engine does it: the plan is made once, the pool is read where it lies."""
    q, pool, work = arguments(placed)
    make = functools.partial(prepare, num_heads=32, max_partials=256, implementation="gpu")
    shapes = jax.eval_shape(make, work, pool)
    work = jax.tree.map(lambda x: placed(x.shape, x.dtype), shapes)

    def layers(q, pool, work):
        def layer(q, number):
            return page_attention(q, pool, number, work, implementation="gpu")[0], None

        return jax.lax.scan(layer, q, jnp.arange(4))[0]

    lowered = jax.jit(layers).trace(q, pool, work).lower(lowering_platforms=("cuda",))
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 256 * 32 * 129 * 4 + 4 * q.size * 2 + 2**20


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tracked": True, "page_size": 64, "dim": 64},
        {"queries": 4, "heads": 64, "per_page": 1, "page_size": 8, "dim": 80},
        {"queries": 128, "heads": 8, "page_size": 128, "dim": 256},
    ],
    ids=str,
)
def test_scores_hold_no_square(placed, sizes):
    """What is allocated besides are the queries, padded, and the tokens' own sums."""
    sizes = dict(sizes)
    queries = sizes.pop("queries", 32)
    q, pool, work = arguments(placed, **sizes)
    _, heads, dim = q.shape
    rows, slots = work.pages.shape[2], work.pages.shape[3] * pool.k.shape[3]
    score = functools.partial(window_scores, window=16, implementation="gpu")
    call = (
        placed((rows, queries, heads, dim), jnp.bfloat16),
        placed((rows, queries, heads), jnp.float32),
        pool, placed(()), work.pages, work.length, placed((rows, queries)),
    )  # fmt: skip
    lowered = jax.jit(score).trace(*call).lower(lowering_platforms=("cuda",))
    memory = lowered.compile().memory_analysis()
    own = rows * heads * (slots * 4 + -(-queries // 8) * 8 * (dim * 2 + 4)) + 8 * rows * slots
    assert memory.temp_size_in_bytes < own + 2**20


@pytest.mark.parametrize("rows", [16, 64, 128])
@pytest.mark.parametrize(
    "function, shape",
    [
        (product, (2048, 2048)),
        (product, (2048, 3072)),
        (product, (8192, 2048)),
        (gated_product, (2048, 2, 8192)),
    ],
)
def test_products_of_few_rows_copy_no_weights(placed, rows, function, shape):
    """What is allocated besides are the padded left side, result and parts of sums."""
    x, w = placed((rows, shape[0]), jnp.bfloat16), placed(shape, jnp.bfloat16)
    run = functools.partial(function, implementation="gpu")
    lowered = jax.jit(run).trace(x, w).lower(lowering_platforms=("cuda",))
    padded = max(rows, 64)
    parts = 8 * padded * shape[-1] * 4
    assert lowered.compile().memory_analysis().temp_size_in_bytes <= parts + padded * shape[0] * 2
