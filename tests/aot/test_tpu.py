"""The TPU kernels compiled ahead of time for four generations, on a machine without any.

It needs libtpu: `pip install -e '.[tpu,test]'` on Python 3.12, then
`JAX_PLATFORMS=cpu pytest -n 0 tests/aot/test_tpu.py`. Without libtpu it is skipped.
"""

import functools
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.cache import KVPool
from kvjax.pallas_kernels.frame_attention import frame_attention
from kvjax.pallas_kernels.page_attention import Items, WorkList, page_attention, tpu_sizes
from kvjax.pallas_kernels.page_write import page_write
from kvjax.pallas_kernels.prefill_attention import prefill_attention
from kvjax.pallas_kernels.window_scores import window_scores

pytest.importorskip("libtpu")

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# The smallest VMEM of these chips (v5p, tpu7x) has 64 MiB, and XLA wants some of it too.
VMEM_BYTES = 40 << 20
# What libtpu asks for where it finds no TPU; two processes may use it at a time.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@functools.cache
def sharding_on(chip):
    os.environ.update(ENVIRONMENT)
    topology = topologies.get_topology_desc(topology_name=CHIPS[chip], platform="tpu")
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())


def compiled(chip, function, arguments, **options):
    """For one chip. Pools keep their axes' order: XLA would turn one whose D is not 128 around."""
    sharding = sharding_on(chip)

    def place(x):
        where = Format(Layout(tuple(range(5))), sharding) if len(x.shape) == 5 else sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    with jax.set_mesh(sharding.mesh):
        lowered = jax.jit(function, **options).lower(*jax.tree.map(place, arguments))
        return lowered.compile()


def shaped(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def pool_of(*, N=1024, R=4, C=8, P=16, D=128, dtype=jnp.bfloat16, tracked=False):
    plane = shaped(N, R, C, P, D, dtype=dtype)
    return KVPool(k=plane, v=plane, position=shaped(N, P) if tracked else None)


def bytes_of(pool):
    """Of keys and values as they lie in memory: the last axis in whole lanes."""
    *others, d = pool.k.shape
    return 2 * math.prod(others) * -(-d // 128) * 128 * pool.k.dtype.itemsize


def scoped_vmem(program, name):
    """Bytes of VMEM that a kernel uses."""
    (line,) = [x for x in program.as_text().splitlines() if f"%{name}" in x and "custom-call(" in x]
    return int(re.search(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', line)[1])


def attention_arguments(*, T=64, H=32, K=8, rows=64, M=128, window=False,
                        classes=((256, 1, 32),), **pool):  # fmt: skip
    pool = pool_of(**({"C": K} | pool))
    groups = K // pool.k.shape[2]
    work = WorkList(
        items=tuple(
            Items(index=shaped(n, 5), count=shaped(), max_queries=q, max_pages=p)
            for n, q, p in classes
        ),
        pages=shaped(1, groups, rows, M),
        length=shaped(1, groups, rows),
        query_position=shaped(T),
    )
    q = shaped(T, H, pool.k.shape[4], dtype=pool.k.dtype)
    return q, pool, shaped(), work, shaped() if window else None


CHUNKS = {"T": 512, "classes": ((256, 1, 32), (96, 32, 32))}
ATTENTION = [
    *((chip, {"window": True} | CHUNKS) for chip in CHIPS),
    ("v5e", {"dtype": jnp.float32, "tracked": True, "soft_cap": 30.0}),
    ("v5p", {"H": 16, "K": 1, "D": 72, "P": 128, "M": 16, "classes": ((32, 16, 4),)}),
    ("v6e", {"C": 1, "M": 64}),
    ("v6e", {"H": 16, "K": 4, "D": 256, "P": 32, "classes": ((64, 64, 16),)}),
    ("tpu7x", {"H": 12, "K": 12, "D": 64}),
    ("tpu7x", {"H": 24, "D": 80, "P": 48, "tracked": True, "window": True}),
    ("v5e", {"T": 4096, "D": 96, "rows": 8, "classes": ((128, 128, 64),)}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "sizes"), ATTENTION, ids=str)
def test_page_attention_compiles_and_copies_no_page(chip, sizes):
    sizes = dict(sizes)
    soft_cap = sizes.pop("soft_cap", None)
    arguments = attention_arguments(**sizes)

    def attend(q, pool, layer, work, window):
        options = {"window": window, "soft_cap": soft_cap, "implementation": "tpu"}
        return page_attention(q, pool, layer, work, **options)

    program = compiled(chip, attend, arguments)
    assert 0 < scoped_vmem(program, "page_attention_tpu") <= VMEM_BYTES
    # Queries and results in another order, for some chips in HBM.
    q, pool = arguments[:2]
    room = 8 * 4 * math.prod(q.shape[:2]) * -(-q.shape[2] // 128) * 128 + (16 << 20)
    assert program.memory_analysis().temp_size_in_bytes <= min(room, bytes_of(pool) // 2)
    cost = program.cost_analysis()
    pairs = sum(n * queries * pages for n, queries, pages in sizes.get("classes", ((256, 1, 32),)))
    assert cost["flops"] >= 4 * pairs * pool.k.shape[3] * math.prod(q.shape[1:])
    assert cost["bytes accessed"] > 0


@pytest.mark.slow
def test_the_limit_on_vmem_binds(monkeypatch):
    """So that what the sizes promise is what the compiler holds them to."""
    monkeypatch.setattr(tpu_sizes, "_SPARE_BYTES", -(8 << 20))
    attend = functools.partial(page_attention, implementation="tpu")
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compiled("v5e", attend, attention_arguments(**CHUNKS)[:4])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "tokens", "groups", "pool"),
    [
        ("v5e", 64, 1, {}),
        ("v5p", 512, 1, {"P": 64, "N": 256}),
        ("v6e", 64, 8, {"C": 1}),
        ("tpu7x", 300, 1, {"C": 3, "D": 80, "dtype": jnp.float32}),
    ],
)
def test_page_write_is_in_place(chip, tokens, groups, pool):
    pool = pool_of(**pool)
    new = shaped(tokens, groups * pool.k.shape[2], pool.k.shape[4], dtype=pool.k.dtype)
    slots = shaped(groups, tokens)
    same = Format(Layout(tuple(range(5))), sharding_on(chip))
    program = compiled(
        chip, functools.partial(page_write, implementation="tpu"),
        (pool.k, pool.v, shaped(), new, new, slots, slots),
        donate_argnums=(0, 1), out_shardings=(same, same),
    )  # fmt: skip
    assert 0 < scoped_vmem(program, "page_write_tpu") <= VMEM_BYTES
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == bytes_of(pool)
    assert memory.temp_size_in_bytes <= 16 << 20
    assert program.cost_analysis()["bytes accessed"] < bytes_of(pool) // 2


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "sizes"), [("v5e", {}), ("tpu7x", {"D": 64})], ids=str)
def test_layers_in_a_scan_copy_no_page(chip, sizes):
    """As a decoder does: the pool is the carry, every layer writes into it and attends to it."""
    q, pool, _, work, _ = attention_arguments(**sizes)
    new = shaped(64, 8, pool.k.shape[4], dtype=pool.k.dtype)

    def layers(pool, q, new, work, page, offset):
        def layer(carry, number):
            (k, v), q = carry
            k, v = page_write(k, v, number, new, new, page, offset, implementation="tpu")
            held = KVPool(k=k, v=v, position=None)
            out, _ = page_attention(q, held, number, work, implementation="tpu")
            return ((k, v), out), None

        numbers = jnp.arange(4, dtype=jnp.int32)
        return jax.lax.scan(layer, ((pool.k, pool.v), q), numbers)[0]

    same, rest = Format(Layout(tuple(range(5))), sharding_on(chip)), sharding_on(chip)
    slots = shaped(1, 64)
    program = compiled(
        chip, layers, (pool, q, new, work, slots, slots),
        donate_argnums=0, out_shardings=((same, same), rest),
    )  # fmt: skip
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == bytes_of(pool)
    assert memory.temp_size_in_bytes <= 16 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "sizes"),
    [
        ("v5e", {}),
        ("v5p", {"C": 1, "M": 256, "tracked": True}),
        ("v6e", {"A": 3, "P": 48, "D": 80}),
        ("tpu7x", {"B": 4, "P": 64, "dtype": jnp.float32, "tracked": True}),
    ],
    ids=str,
)
def test_scores_hold_no_square(chip, sizes):
    sizes = {"A": 32, "B": 1, "M": 2048} | sizes
    A, B, M = (sizes.pop(x) for x in "ABM")
    pool = pool_of(**sizes)
    J, (P, D) = 8 // pool.k.shape[2], pool.k.shape[3:]
    call = (
        shaped(B, A, 32, D, dtype=pool.k.dtype), shaped(B, A, 32, dtype=jnp.float32), pool,
        shaped(), shaped(1, J, B, M), shaped(1, J, B), shaped(B, A),
    )  # fmt: skip
    score = functools.partial(window_scores, window=16, implementation="tpu")
    program = compiled(chip, score, call)
    assert 0 < scoped_vmem(program, "window_scores_tpu") <= VMEM_BYTES
    # The tokens' own sums a few times over, as XLA makes windows of them; a square is A of them.
    assert program.memory_analysis().temp_size_in_bytes <= 6 * (32 * 4 * B * M * P) + (16 << 20)
    assert program.cost_analysis()["flops"] >= 2 * (B * A * 32 * M * P) * D


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "D", "window"), [("v5e", 64, 0), ("tpu7x", 128, 256)])
def test_prefill_attention_compiles_forwards_and_backwards(chip, D, window):
    def both(q, k, v):
        def loss(q, k, v):
            out, lse = prefill_attention(q, k, v, window=window, implementation="splash")
            return jnp.sum(out.astype(jnp.float32)), lse

        return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    q, kv = shaped(2, 1024, 32, D, dtype=jnp.bfloat16), shaped(2, 1024, 8, D, dtype=jnp.bfloat16)
    # JAX's own kernel mixes dtypes.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        text = compiled(chip, both, (q, kv, kv)).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 3  # forwards, and two backwards


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_frame_attention_reads_the_ring_where_it_lies(chip):
    """XLA's own fusions do: nothing is in memory but the arguments and the result."""
    new, ring = (shaped(1, 256, 16, t, 72, dtype=jnp.bfloat16) for t in (8, 25))

    def attend(q, k, v, ring_k, ring_v, length):
        return frame_attention(q, k, v, ring_k, ring_v, length=length, finite=True)

    memory = compiled(chip, attend, (new, new, new, ring, ring, shaped())).memory_analysis()
    assert memory.temp_size_in_bytes < 2**20


@pytest.mark.slow
def test_frame_attention_has_gradients():
    def loss(q, k, v):
        return jnp.sum(frame_attention(q, k, v).astype(jnp.float32))

    new = shaped(1, 256, 16, 8, 72, dtype=jnp.bfloat16)
    memory = compiled("v5e", jax.grad(loss, (0, 1, 2)), (new,) * 3).memory_analysis()
    assert memory.temp_size_in_bytes < 2**20  # no scores: frames see each other in fusions
