"""The consumers of the attention kernel: the products and the online softmax."""

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kvjax.pallas_kernels.page_attention.gpu_plan import BLOCK, Field, Mode
from kvjax.pallas_kernels.page_attention.gpu_rows import load_per_row, load_rows, store_rows
from kvjax.pallas_kernels.page_attention.gpu_task import (
    Inputs,
    Ring,
    Sizes,
    Unit,
    first_tile,
    i32,
    pick,
)

__all__ = ["consume"]

Array = jax.Array

_LOG2_E = math.log2(math.e)
# Below every score, and finite: the difference of two infinities would be no number.
_LOWEST = -1e30
_COLUMN = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What a consumer knows of its 64 rows of a unit.

    Attributes:
        limit: int32[64], the first slot that a row does not see.
        lower: int32[64], the first that it does.
        first_slot: of the unit.
        stop: the first slot that is not the item's.
        masked_from: the first tile that some row sees only in part.
        masked_until: the tiles before it too, because of the window.
    """

    limit: Array
    lower: Array | None
    first_slot: Array
    stop: Array
    masked_from: Array
    masked_until: Array


def _load(sizes: Sizes, inputs: Inputs, queries: Any, unit: Unit, head: Array, row: Array) -> _Rows:
    """Puts the rows' queries into shared memory, and says which keys they see."""
    group = sizes.shape.group
    query, rows = unit[Field.FIRST_QUERY], unit[Field.ROWS]
    queries[...] = load_rows(
        inputs.q, query, head * group, row, rows, group=group, heads=sizes.heads, dim=sizes.dim
    )
    plgpu.commit_smem()
    position = load_per_row(inputs.position, query, row, rows, group=group)
    first_slot, stop = unit[Field.FIRST_PAGE] * sizes.page_size, unit[Field.STOP]
    limit = jnp.minimum(position + 1, stop)
    lower, masked_until = None, i32(0)
    if sizes.windowed:
        window = inputs.window[0]
        lower = position + jnp.where(window > 0, 1 - window, -(2**30))
        reach = unit[Field.MOST_POSITION] - window + 1 - first_slot
        tiles = lax.div(jnp.maximum(reach, 0) + sizes.shape.tile - 1, i32(sizes.shape.tile))
        masked_until = jnp.where(window > 0, tiles, 0)
    return _Rows(limit, lower, first_slot, stop, unit[Field.FULL], masked_until)


def _seen(sizes: Sizes, rows: _Rows, tile: Array) -> Array:
    """Which keys of a tile each row sees, bool[64, tile]."""
    shape = (BLOCK, sizes.shape.tile)
    slot = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    slot = slot + (rows.first_slot + tile * sizes.shape.tile)
    seen = slot < lax.broadcast_in_dim(rows.limit, shape, [0])
    if rows.lower is not None:
        seen = seen & (slot >= lax.broadcast_in_dim(rows.lower, shape, [0]))
    return seen


def _in_pages(
    sizes: Sizes, inputs: Inputs, unit: Unit, tile: Array, shape: tuple[int, int], axis: int
) -> Array:
    """Which slots of a tile lie in a page at all, bool[shape] along `axis`."""
    size = sizes.page_size
    num_pages = inputs.k.shape[0] // (sizes.layers_per_page * sizes.heads_per_page)
    offset = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
    start = tile * sizes.shape.tile
    entry = unit[Field.FIRST_PAGE] + lax.div(start, i32(size))
    inside: Any = None
    for j in range(sizes.copies):
        column = jnp.minimum(entry + j, unit[Field.LAST_ENTRY])
        page = inputs.pages[unit.group, unit.heads, unit[Field.ROW], column]
        # A page that is none ends before it begins.
        end = jnp.where(page < num_pages, (j + 1) * size, j * size)
        here = (offset >= j * size) & (offset < end)
        inside = here if inside is None else inside | here
    return inside


def _hide(
    sizes: Sizes, inputs: Inputs, unit: Unit, rows: _Rows, tile: Array, score: Array
) -> Array:
    seen = _seen(sizes, rows, tile)
    score = jnp.where(seen, score, -jnp.inf)
    return lax.cond(
        unit[Field.HOLES] > 0,
        lambda s: jnp.where(_in_pages(sizes, inputs, unit, tile, s.shape, 1), s, -jnp.inf),
        lambda s: s,
        score,
    )


def _clean(sizes: Sizes, inputs: Inputs, unit: Unit, rows: _Rows, tile: Array, values: Any) -> None:
    """Zeroes the values of slots that are not in use: 0 times what they may hold need not be 0."""
    shape = (sizes.shape.tile, sizes.dim)
    left = rows.stop - rows.first_slot - tile * sizes.shape.tile

    def zero(live: Array) -> None:
        held = plgpu.load(values, layout=plgpu.Layout.WGMMA)  # pyright: ignore[reportCallIssue]
        values[...] = jnp.where(live, held, jnp.zeros((), held.dtype))
        plgpu.commit_smem()

    @pl.when(left < sizes.shape.tile)
    def _() -> None:
        offset = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        zero(offset < left)

    @pl.when(unit[Field.HOLES] > 0)
    def _() -> None:
        zero(_in_pages(sizes, inputs, unit, tile, shape, 0))


def consume(sizes: Sizes, inputs: Inputs, ring: Ring, turns: Array, me: Array) -> None:
    """Attends with all units of this thread block's, or one of two consumers' part of them."""
    shape, dim = sizes.shape, sizes.dim
    group, window = inputs.group(sizes), inputs.window[0]
    factor = _LOG2_E if sizes.soft_cap is not None else sizes.scale * _LOG2_E
    own_head = shape.mode is Mode.HEADS

    def tile_body(tile: Array, carry: tuple, unit: Unit, rows: _Rows) -> tuple:
        acc, top, total, n = carry
        place = n * 2 + me if own_head else n
        slot = lax.rem(place, i32(sizes.stages))
        masked = (tile >= rows.masked_from) | (tile < rows.masked_until)

        def multiply(product: Any) -> Array:
            plgpu.wgmma(product, ring.q.at[me], ring.k.at[slot].T)
            return product[...]

        plgpu.barrier_wait(ring.k_full.at[slot])
        score = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((BLOCK, shape.tile), jnp.float32))
        plgpu.barrier_arrive(ring.k_empty.at[slot])
        if sizes.soft_cap is not None:
            score = sizes.soft_cap * jnp.tanh(score * (sizes.scale / sizes.soft_cap))
        score = lax.cond(
            masked, lambda s: _hide(sizes, inputs, unit, rows, tile, s), lambda s: s, score
        )
        higher = jnp.maximum(top, jnp.max(score, axis=1) * factor)
        shrink = jnp.exp2(top - higher)
        weight = jnp.exp2(score * factor - lax.broadcast_in_dim(higher, score.shape, [0]))
        total = total * shrink + jnp.sum(weight, axis=1)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        weight = weight.astype(inputs.v.dtype)

        def accumulate(product: Any) -> None:
            plgpu.wgmma(product, weight, ring.v.at[slot])

        plgpu.barrier_wait(ring.v_full.at[slot])
        pl.when(masked)(lambda: _clean(sizes, inputs, unit, rows, tile, ring.v.at[slot]))
        acc = pl.run_state(accumulate)(plgpu.WGMMAAccumulatorRef.init(acc))
        plgpu.barrier_arrive(ring.v_empty.at[slot])
        return acc, higher, total, n + 1

    def unit_body(turn: Array, n: Array) -> Array:
        number, share = pick(sizes, turn)
        head = share * 2 + me if own_head else share
        unit = Unit(inputs, group, lax.div(head, i32(sizes.heads_per_page)), number)
        row = unit[Field.FIRST_ROW] + (me * BLOCK if shape.mode is Mode.BLOCKS else 0)
        rows = _load(sizes, inputs, ring.q.at[me], unit, head, row)
        tiles = unit[Field.TILES]
        acc = plgpu.layout_cast(jnp.zeros((BLOCK, dim), jnp.float32), plgpu.Layout.WGMMA)
        top = plgpu.layout_cast(jnp.full((BLOCK,), _LOWEST, jnp.float32), _COLUMN)
        total = plgpu.layout_cast(jnp.zeros((BLOCK,), jnp.float32), _COLUMN)
        acc, top, total, n = lax.fori_loop(
            first_tile(sizes, unit, window, tiles), tiles,
            lambda tile, carry: tile_body(tile, carry, unit, rows), (acc, top, total, n),
        )  # fmt: skip
        _finish(sizes, inputs, unit, head, row, rows, acc, top, total)
        return n

    lax.fori_loop(i32(0), turns, unit_body, i32(0))


def _finish(
    sizes: Sizes, inputs: Inputs, unit: Unit, head: Array, row: Array, rows: _Rows, acc: Array,
    top: Array, total: Array,
) -> None:  # fmt: skip
    """Writes a unit's result: to the output, or as a partial one."""
    total = jnp.where(rows.limit > 0, total, 0.0)  # a padding query may have seen whole tiles
    some = total > 0
    inverse = jnp.where(some, 1.0 / jnp.where(some, total, 1.0), 0.0)
    lse = jnp.where(some, top * (1 / _LOG2_E) + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
    out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
    sizes_of = {"group": sizes.shape.group, "heads": sizes.heads, "dim": sizes.dim}
    where = (head * sizes.shape.group, row, unit[Field.ROWS])
    direct = unit[Field.DIRECT] > 0

    @pl.when(direct)
    def _() -> None:
        values = out.astype(inputs.out.dtype)
        query = unit[Field.FIRST_QUERY]
        store_rows(inputs.out, inputs.lse, None, values, lse, query, *where, **sizes_of)

    @pl.when(jnp.logical_not(direct))
    def _() -> None:
        place = unit[Field.PLACE]
        store_rows(inputs.part, inputs.part_lse, inputs.slot, out, lse, place, *where, **sizes_of)
