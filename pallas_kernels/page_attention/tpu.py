"""`page_attention` on TPU: one Mosaic kernel that keeps all results in VMEM.

The pages come by one copy each, all heads of the layer at once, several blocks ahead. See
`tpu_kernel` for the walk and `tpu_sizes` for what has to fit.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvjax.pallas_kernels.page_attention.tpu_kernel import Plane, Refs, Rule, attend_kernel
from kvjax.pallas_kernels.page_attention.tpu_sizes import LANES, Sizes, sizes_of
from kvjax.pallas_kernels.page_attention.work import Items, Pages, WorkList

__all__ = ["page_attention_tpu"]

Array = jax.Array


def page_attention_tpu(
    q: Array, pool: Pages, layer: Array, work: WorkList,
    window: Array | None, soft_cap: float | None, scale: float, *,
    interpret: Any = False, cores: int | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """See `api.page_attention`.

    True positions of a pool that tracks them are below 2**24.

    Args:
        q: as there, and so on.
        pool: pages of 8 (float32) or 16 (bfloat16) to 128 tokens, in steps of as many.
        layer: as there.
        work: whose table of a layer group, and whose items, fit in SMEM.
        window: as there.
        soft_cap: as there.
        scale: as there.
        interpret: as in `pl.pallas_call`.
        cores: TensorCores of a device; None: what the target has.

    Raises:
        NotImplementedError: with the shapes, where this needs the reference.
    """
    sizes = sizes_of(q, pool, work, _cores() if cores is None else cores)
    exact = pool.k.dtype == jnp.float32 or q.dtype == jnp.float32
    rule = Rule(scale=scale, soft_cap=soft_cap, windowed=window is not None, exact=exact)
    call = _call(sizes, rule, q, pool, work, interpret)
    group = layer // pool.k.shape[1]
    out, lse = call(
        _numbers(layer, pool, work, window),
        jnp.concatenate([_worth_reading(items, pool, work, window) for items in work.items]),
        work.pages[group].reshape(-1),
        work.length[group].reshape(-1),
        *_rows(q, work.query_position, sizes),
        *([pool.k, pool.v] if pool.position is None else [pool.k, pool.v, pool.position]),
    )
    out, lse = (_queries(x, q.shape, sizes) for x in (out, lse.swapaxes(1, 2)))
    return out.astype(q.dtype), lse[:, :, 0]


def _rows(q: Array, position: Array, sizes: Sizes) -> tuple[Array, Array]:
    """Queries as float32[K, rows, D], G rows each, and the rows' positions, int32[rows, 128]."""
    t, h, d = q.shape
    padding = (0, sizes.rows * sizes.row_blocks - t * sizes.group)
    q = q.astype(jnp.float32).reshape(t, -1, sizes.group, d).swapaxes(0, 1)
    q = q.reshape(h // sizes.group, -1, d)
    position = jnp.pad(jnp.repeat(position, sizes.group), padding, constant_values=-1)
    position = jnp.broadcast_to(position[:, None], (position.shape[0], LANES))
    return jnp.pad(q, ((0, 0), padding, (0, 0))), position


def _queries(x: Array, shape: tuple[int, ...], sizes: Sizes) -> Array:
    """From [K, rows, x] to [T, H, x]."""
    t, h, _ = shape
    x = x[:, : t * sizes.group].reshape(-1, t, sizes.group, x.shape[2])
    return x.swapaxes(0, 1).reshape(t, h, -1)


def _cores() -> int:
    """TensorCores that work on one grid: two on v4 and v5p, one elsewhere."""
    try:
        return pltpu.get_tpu_info().num_cores
    except (ValueError, NotImplementedError, RuntimeError):  # the target is not known yet
        return 1


def _numbers(layer: Array, pool: Pages, work: WorkList, window: Array | None) -> Array:
    every = jnp.int32(2**31 - 1)
    seen = every if window is None else jnp.where(window == 0, every, window)
    inner = layer % pool.k.shape[1]
    return jnp.stack([inner, seen, *(items.count for items in work.items)]).astype(jnp.int32)


def _worth_reading(items: Items, pool: Pages, work: WorkList, window: Array | None) -> Array:
    """Items, int32[5 * I], without the pages before all windows, if slots are positions."""
    if window is None or pool.position is not None:
        return items.index.reshape(-1)
    query = items.index[:, 3, None] + jnp.arange(items.max_queries, dtype=jnp.int32)[None]
    position = work.query_position.at[query].get(mode="fill", fill_value=-1)
    position = jnp.where((query < items.index[:, 4, None]) & (position >= 0), position, 2**31 - 1)
    begin = jnp.min(position, axis=1) - window + 1
    first = jnp.maximum(items.index[:, 1], jnp.where(window == 0, 0, begin // pool.k.shape[3]))
    return items.index.at[:, 1].set(jnp.minimum(first, items.index[:, 2])).reshape(-1)


def _call(
    sizes: Sizes, rule: Rule, q: Array, pool: Pages, work: WorkList, interpret: Any
) -> Callable[..., tuple[Array, Array]]:
    table = (work.pages.shape[2], work.pages.shape[3])
    (p, d), dtype, tracked = pool.k.shape[3:], pool.k.dtype, pool.position is not None
    heads, rows = q.shape[1] // sizes.group, sizes.rows * sizes.row_blocks
    state = pl.BlockSpec((sizes.heads, sizes.rows, d), lambda i, j, *_: (i, j, 0))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    blocks = pltpu.VMEM((sizes.slots, sizes.heads, sizes.block_pages, p, d), dtype)
    positions = [pltpu.VMEM((sizes.slots, sizes.block_pages, p), jnp.int32)] if tracked else []

    def body(*refs: Any) -> None:
        plane = Plane(refs[8], refs[14]) if tracked else None
        if tracked:
            refs = (*refs[:8], *refs[9:14], *refs[15:])
        attend_kernel(Refs._make((*refs, plane)), sizes, rule, table)

    return pl.pallas_call(
        body,
        name="page_attention_tpu",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(heads // sizes.heads, sizes.row_blocks),
            in_specs=[
                state,
                pl.BlockSpec((sizes.rows, LANES), lambda i, j, *_: (j, 0)),
                *([hbm] * (3 if tracked else 2)),
            ],
            out_specs=[
                state,
                pl.BlockSpec((sizes.heads, 1, sizes.rows), lambda i, j, *_: (i, 0, j)),
            ],
            scratch_shapes=[
                pltpu.VMEM((sizes.heads, sizes.rows, LANES), jnp.float32),
                blocks,
                blocks,
                *positions,
                pltpu.VMEM((1, sizes.block_pages * p), jnp.int32),
                pltpu.SMEM((sizes.slots,), jnp.int32),
                pltpu.SemaphoreType.DMA((sizes.slots,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((heads, rows, d), jnp.float32),
            jax.ShapeDtypeStruct((heads, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=sizes.vmem_bytes,
            # They take half of the scalar work, and pages are clamped to the pool anyway.
            disable_bounds_checks=True,
        ),
        cost_estimate=_cost(q, pool, work),
        interpret=interpret,
    )


def _cost(q: Array, pool: Pages, work: WorkList) -> pl.CostEstimate:
    """Of as many full items as there is room for: what a call costs at most."""
    (_, h, d), p = q.shape, pool.k.shape[3]
    pairs = tokens = 0
    for items in work.items:
        keys = items.index.shape[0] * items.max_pages * p
        tokens += keys
        pairs += keys * items.max_queries
    heads = work.pages.shape[1] * pool.k.shape[2]
    moved = 2 * tokens * heads * d * pool.k.dtype.itemsize + 12 * math.prod(q.shape)
    return pl.CostEstimate(flops=4 * pairs * h * d, transcendentals=pairs * h, bytes_accessed=moved)
