"""`window_scores` on TPU: tokens' sums from one Mosaic kernel, which reads each key once.

A grid step owns a row, a head group and a block of tokens. Pages come by one copy each, all heads
of the layer at once, some blocks ahead; the products with all queries and their sums stay in VMEM.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["token_scores_tpu"]

Array = jax.Array

_LANES = 128
# Tokens of a block, about: their keys of 8 heads are a megabyte.
_BLOCK = 512
# Blocks in VMEM: one that is computed, the others on their way.
_PLACES = 3
_SMEM_BYTES = 512 << 10
_VMEM_BYTES = 32 << 20
_LOG2_E = math.log2(math.e)


def token_scores_tpu(
    q: Array, lse: Array, pool: Any, layer: Array, pages: Array, end: Array,
    query_position: Array, position: Array, scale: float, *, interpret: Any = False,
) -> Array:  # fmt: skip
    """What the queries pay to each slot in all.

    Args:
        q: as in `api.window_scores`, and so on.
        lse: as there.
        pool: pages of 8 (float32) or 16 (bfloat16) tokens, or a multiple.
        layer: as there.
        pages: int32[J, B, M] of the layer's group.
        end: int32[J, B] likewise.
        query_position: as there.
        position: int32[J, B, S], of the slots.
        scale: as there.
        interpret: as in `pl.pallas_call`.

    Returns:
        float32[B, H, S]; anything where a slot is not live.

    Raises:
        NotImplementedError: with the shapes, where this needs the reference.
    """
    (b, a, h, d), (j, _, m) = q.shape, pages.shape
    _, r, c, p, _ = pool.k.shape
    sizes = _sizes(q, pool, pages)
    rows, slots = sizes.group * sizes.queries, sizes.blocks * sizes.block_pages * p
    pad = ((0, 0), (0, sizes.queries - a))
    q = jnp.pad(q, (*pad, (0, 0), (0, 0))).reshape(b, sizes.queries, j, c, sizes.group, d)
    q = jnp.transpose(q, (0, 2, 3, 4, 1, 5)).reshape(b, j, c, rows, d)
    lse = jnp.pad(lse * _LOG2_E, (*pad, (0, 0))).reshape(b, sizes.queries, j, c, sizes.group)
    lse = jnp.transpose(lse, (0, 2, 3, 4, 1)).reshape(b, j, c, rows, 1)
    query_position = jnp.pad(query_position, pad, constant_values=-1)
    query_position = jnp.tile(query_position, (1, sizes.group))[..., None]
    position = jnp.pad(position, ((0, 0), (0, 0), (0, slots - m * p)))[:, :, None]
    scores = _call(sizes, q, pool.k, pages, scale, interpret)(
        (layer % r).reshape(1), pages.reshape(-1), end.reshape(-1), q, lse, query_position,
        position, pool.k,
    )  # fmt: skip
    return scores.reshape(b, h, slots)[..., : m * p]


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Static sizes.

    Attributes:
        group: G.
        queries: A, whole sublanes of them.
        block_pages: entries of the table that a grid step reads.
        blocks: of the table.
    """

    group: int
    queries: int
    block_pages: int
    blocks: int


def _sizes(q: Array, pool: Any, pages: Array) -> _Sizes:
    (_, a, h, d), (j, _, m) = q.shape, pages.shape
    _, _, c, p, _ = pool.k.shape
    dtype = pool.k.dtype
    if dtype not in (jnp.float32, jnp.bfloat16) or p % (32 // dtype.itemsize):
        raise NotImplementedError(f"on TPU: {pool.k.shape=} {dtype=}, pages are tiles")
    if 4 * pages.size > _SMEM_BYTES:
        raise NotImplementedError(f"on TPU: {pages.shape=} does not fit in SMEM")
    unit = math.lcm(p, _LANES) // p  # whole lanes of tokens
    block_pages = min(max(1, _BLOCK // (unit * p)), -(-m // unit)) * unit
    group, queries = h // (j * c), -(-a // 8) * 8
    wide, rows, tokens = -(-d // _LANES) * _LANES, group * queries, block_pages * p
    # Keys; queries and the columns beside them, twice; scores of one head, a few at a time.
    used = _PLACES * c * tokens * wide * dtype.itemsize
    used += 2 * (c * rows * (wide + _LANES) + rows * _LANES + 2 * c * group * tokens) * 4
    used += 6 * rows * tokens * 4
    if used > _VMEM_BYTES:
        raise NotImplementedError(f"on TPU: {q.shape=} with {pool.k.shape=} does not fit in VMEM")
    return _Sizes(group, queries, block_pages, -(-m // block_pages))


def _call(
    sizes: _Sizes, q: Array, k: Array, pages: Array, scale: float, interpret: Any
) -> Callable[..., Array]:
    (b, j, c, rows, d), table = q.shape, (pages.shape[1], pages.shape[2])
    tokens = sizes.block_pages * k.shape[3]
    slots = sizes.blocks * tokens
    pairs = b * j * c * rows * slots

    def all_heads(last: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, c, rows, last), lambda i, n, t, *_: (i, n, 0, 0, 0))

    return pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, table=table, scale=scale),
        name="window_scores_tpu",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, j, sizes.blocks),
            in_specs=[
                all_heads(d),
                all_heads(1),
                pl.BlockSpec((1, rows, 1), lambda i, n, t, *_: (i, 0, 0)),
                pl.BlockSpec((1, 1, 1, tokens), lambda i, n, t, *_: (n, i, 0, t)),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=pl.BlockSpec(
                (1, 1, c * sizes.group, tokens), lambda i, n, t, *_: (i, n, 0, t)
            ),
            scratch_shapes=[
                pltpu.VMEM((_PLACES, c, sizes.block_pages, k.shape[3], d), k.dtype),
                pltpu.SemaphoreType.DMA((_PLACES,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((b, j, c * sizes.group, slots), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES + (8 << 20),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * d,
            transcendentals=pairs,
            bytes_accessed=b * j * c * slots * (d * k.dtype.itemsize + 4 * sizes.group),
        ),
        interpret=interpret,
    )  # fmt: skip


def _kernel(
    inner: Any, pages: Any, end: Any, q: Any, lse: Any, query_position: Any, position: Any, k: Any,
    out: Any, keys: Any, sems: Any, *, sizes: _Sizes, table: tuple[int, int], scale: float,
) -> None:  # fmt: skip
    """One block of tokens.

    Args:
        inner: SMEM int32[1], the layer's place in a page.
        pages: SMEM int32[J * B * M].
        end: SMEM int32[J * B].
        q: VMEM [1, 1, C, G * A, D].
        lse: VMEM float32[1, 1, C, G * A, 1], to base 2.
        query_position: VMEM int32[1, G * A, 1].
        position: VMEM int32[1, 1, 1, tokens].
        k: HBM [N, R, C, P, D].
        out: VMEM float32[1, 1, C * G, tokens].
        keys: VMEM [places, C, block_pages, P, D].
        sems: a DMA semaphore a place.
        sizes: static.
        table: (B, M).
        scale: of the products.
    """
    block, row = pl.program_id(2), pl.program_id(1) * table[0] + pl.program_id(0)
    page_size = k.shape[3]
    used = jnp.clip(pl.cdiv(end[row], page_size), 0, table[1])

    def copies(number: Array, *, start: bool) -> None:
        """Starts, or awaits, the copies of a block's pages."""
        place = number % _PLACES
        first = number * sizes.block_pages

        def copy(i: Array, carry: None) -> None:
            page = jnp.minimum(pages[row * table[1] + first + i], k.shape[0] - 1)
            source, target = k.at[page, inner[0]], keys.at[place, :, i]
            one = pltpu.make_async_copy(source, target, sems.at[place])
            one.start() if start else one.wait()

        jax.lax.fori_loop(0, jnp.clip(used - first, 0, sizes.block_pages), copy, None)

    @pl.when(block == 0)
    def _() -> None:
        for number in range(_PLACES - 1):
            copies(jnp.int32(number), start=True)

    copies(block + _PLACES - 1, start=True)
    copies(block, start=False)

    @pl.when(block * sizes.block_pages < used)
    def _() -> None:
        seen = position[0, 0] <= query_position[0]  # [G * A, tokens]
        for head in range(k.shape[2]):
            held = keys[block % _PLACES, head].reshape(-1, k.shape[4])
            heads = pl.ds(head * sizes.group, sizes.group)
            out[0, 0, heads] = _sums(q[0, 0, head], held, lse[0, 0, head], seen, sizes, scale)


def _sums(q: Array, keys: Array, lse: Array, seen: Array, sizes: _Sizes, scale: float) -> Array:
    """Of one KV head, float32[G, tokens]."""
    exact = keys.dtype == jnp.float32 or q.dtype == jnp.float32
    dtype = jnp.float32 if exact else keys.dtype
    score = jax.lax.dot_general(
        q.astype(dtype), keys.astype(dtype), (((1,), (1,)), ((), ())),
        precision="highest" if exact else None, preferred_element_type=jnp.float32,
    )  # fmt: skip
    weight = jnp.where(seen, jnp.exp2(score * (scale * _LOG2_E) - lse), 0.0)
    return jnp.sum(weight.reshape(sizes.group, sizes.queries, -1), axis=1)
