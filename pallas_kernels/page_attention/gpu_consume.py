"""The consumers of the attention kernel: the products and the online softmax."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kvjax.pallas_kernels.page_attention.gpu_plan import BLOCK, NEVER, Field, Mode
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
_LINE = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Which slots each of 64 rows sees.

    Attributes:
        limit: int32[64], the first position that it does not see.
        lower: int32[64], the first one that it does; None: the first there is.
    """

    limit: Array
    lower: Array | None


class _Share(NamedTuple):
    """What a consumer needs to know of its 64 rows of a unit, in registers."""

    number: Array  # of the unit
    head: Array  # its KV head
    query: Array  # the item's first
    row: Array  # the first of the 64
    rows: Array  # of the item
    first_slot: Array
    stop: Array
    full: Array
    first_tile: Array
    tiles: Array
    masked_until: Array
    direct: Array
    place: Array


def _share(sizes: Sizes, inputs: Inputs, me: Array, turn: Array) -> _Share:
    mode, window = sizes.shape.mode, inputs.window[0]
    number, share = pick(sizes, turn)
    # The turn after the last one is asked for too.
    number = jnp.minimum(number, inputs.units.shape[2] - 1)
    head = share * 2 + me if mode is Mode.HEADS else share
    unit = _unit(sizes, inputs, number, head)
    tiles, first_slot = unit[Field.TILES], unit[Field.FIRST_PAGE] * sizes.page_size
    masked_until = i32(0)
    if sizes.windowed:
        reach = unit[Field.MOST_POSITION] - window + 1 - first_slot
        inside = lax.div(jnp.maximum(reach, 0) + sizes.shape.tile - 1, i32(sizes.shape.tile))
        masked_until = jnp.where(window > 0, tiles if sizes.tracked else inside, 0)
    return _Share(
        number=number,
        head=head,
        query=unit[Field.FIRST_QUERY],
        row=unit[Field.FIRST_ROW] + (me * BLOCK if mode is Mode.BLOCKS else 0),
        rows=jnp.maximum(unit[Field.ROWS], 1),
        first_slot=first_slot,
        stop=unit[Field.STOP],
        full=unit[Field.FULL],
        first_tile=first_tile(sizes, unit, window, tiles),
        tiles=tiles,
        masked_until=masked_until,
        direct=unit[Field.DIRECT],
        place=unit[Field.PLACE],
    )


def _unit(sizes: Sizes, inputs: Inputs, number: Array, head: Array) -> Unit:
    heads = lax.div(head, i32(sizes.heads_per_page))
    return Unit(inputs, inputs.group(sizes), heads, number)


def _load(sizes: Sizes, inputs: Inputs, share: _Share) -> tuple[Array, Array]:
    """The queries, [64, D], and their positions, int32[64]."""
    group = sizes.shape.group
    place = share.row, share.rows
    q = load_rows(
        inputs.q, share.query, share.head * group, *place, group=group, heads=sizes.heads,
        dim=sizes.dim,
    )  # fmt: skip
    return q, load_per_row(inputs.position, share.query, *place, group=group)


def _limits(sizes: Sizes, inputs: Inputs, share: _Share, position: Array) -> _Rows:
    lower = None
    if sizes.windowed:
        window = inputs.window[0]
        lower = position + jnp.where(window > 0, 1 - window, -(2**30))
    if sizes.tracked:
        return _Rows(position + 1, lower)
    return _Rows(jnp.minimum(position + 1, share.stop), lower)


def _seen(sizes: Sizes, inputs: Inputs, share: _Share, rows: _Rows, tile: Array) -> Array:
    """Which keys of a tile each row sees, bool[64, tile]."""
    shape = (BLOCK, sizes.shape.tile)
    slot = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    slot = slot + (share.first_slot + tile * sizes.shape.tile)
    key = slot
    if sizes.tracked:
        key = lax.broadcast_in_dim(_key_positions(sizes, inputs, share, tile, _LINE), shape, [1])
    seen = key < lax.broadcast_in_dim(rows.limit, shape, [0])
    if sizes.tracked:
        seen = seen & (slot < share.stop)
    if rows.lower is not None:
        seen = seen & (key >= lax.broadcast_in_dim(rows.lower, shape, [0]))
    return seen


def _key_positions(sizes: Sizes, inputs: Inputs, share: _Share, tile: Array, layout: Any) -> Array:
    """Of a tile's slots, int32[tile]."""
    unit, first = _unit(sizes, inputs, share.number, share.head), share.first_slot
    start = pl.multiple_of(first + tile * sizes.shape.tile, min(sizes.page_size, 8))
    slots = pl.ds(start, sizes.shape.tile)
    held = inputs.slot_position.at[unit.group, unit.heads, unit[Field.ROW], slots]
    # Not tiled, and so not `optimized`; it lies in a cache after the first head has read it.
    return plgpu.load(held, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]


def _in_pages(
    sizes: Sizes, inputs: Inputs, share: _Share, tile: Array, shape: tuple[int, int], axis: int
) -> Array:
    """Which slots of a tile lie in a page at all, bool[shape] along `axis`."""
    size, unit = sizes.page_size, _unit(sizes, inputs, share.number, share.head)
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
    sizes: Sizes, inputs: Inputs, share: _Share, rows: _Rows, tile: Array, score: Array
) -> Array:
    seen = _seen(sizes, inputs, share, rows, tile)
    score = jnp.where(seen, score, -jnp.inf)
    if sizes.tracked:
        return score
    return lax.cond(
        _unit(sizes, inputs, share.number, share.head)[Field.HOLES] > 0,
        lambda s: jnp.where(_in_pages(sizes, inputs, share, tile, s.shape, 1), s, -jnp.inf),
        lambda s: s,
        score,
    )


def _clean(sizes: Sizes, inputs: Inputs, share: _Share, tile: Array, values: Any) -> None:
    """Zeroes the values of slots that are not in use: 0 times what they may hold need not be 0."""
    shape = (sizes.shape.tile, sizes.dim)
    left = share.stop - share.first_slot - tile * sizes.shape.tile

    def zero(live: Array) -> None:
        held = plgpu.load(values, layout=plgpu.Layout.WGMMA)  # pyright: ignore[reportCallIssue]
        values[...] = jnp.where(live, held, jnp.zeros((), held.dtype))
        plgpu.commit_smem()

    @pl.when(left < sizes.shape.tile)
    def _() -> None:
        offset = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        zero(offset < left)

    @pl.when(_unit(sizes, inputs, share.number, share.head)[Field.HOLES] > 0)
    def _() -> None:
        if not sizes.tracked:
            return zero(_in_pages(sizes, inputs, share, tile, shape, 0))
        key = _key_positions(sizes, inputs, share, tile, _COLUMN)
        zero(lax.broadcast_in_dim(key < NEVER, shape, [0]))


def consume(sizes: Sizes, inputs: Inputs, ring: Ring, turns: Array, me: Array) -> None:
    """Attends with all units of this thread block's, or one of two consumers' part of them.

    Where a unit is short, its queries are read while the one before it is being attended with.
    """
    queries = ring.q.at[me]
    ahead = sizes.shape.mode is not Mode.BLOCKS and sizes.dim <= 128  # else no registers are left

    def unit_body(turn: Array, carry: tuple) -> tuple:
        n, share, following, loaded = carry
        q, position = loaded if ahead else _load(sizes, inputs, share)
        queries[...] = q
        plgpu.commit_smem()
        rows = _limits(sizes, inputs, share, position)
        loaded = _load(sizes, inputs, following) if ahead else ()
        after = _share(sizes, inputs, me, turn + 2)
        n = _attend(sizes, inputs, ring, me, share, rows, n)
        return n, following, after, loaded

    first, second = (_share(sizes, inputs, me, i32(turn)) for turn in range(2))
    loaded = _load(sizes, inputs, first) if ahead else ()
    lax.fori_loop(i32(0), turns, unit_body, (i32(0), first, second, loaded))


def _attend(
    sizes: Sizes, inputs: Inputs, ring: Ring, me: Array, share: _Share, rows: _Rows, n: Array
) -> Array:
    """Attention of 64 rows to a unit's tiles, of which the first is the ring's n-th."""

    def tile_body(tile: Array, carry: tuple) -> tuple:
        n, state = carry
        place = n * 2 + me if sizes.shape.mode is Mode.HEADS else n
        slot = lax.rem(place, i32(sizes.stages))
        return n + 1, _attend_tile(sizes, inputs, ring, me, share, rows, tile, slot, state)

    acc = plgpu.layout_cast(jnp.zeros((BLOCK, sizes.dim), jnp.float32), plgpu.Layout.WGMMA)
    top = plgpu.layout_cast(jnp.full((BLOCK,), _LOWEST, jnp.float32), _COLUMN)
    total = plgpu.layout_cast(jnp.zeros((BLOCK,), jnp.float32), _COLUMN)
    carry = n, (acc, top, total)
    n, state = lax.fori_loop(share.first_tile, share.tiles, tile_body, carry)
    _finish(sizes, inputs, share, rows, *state)
    return n


def _attend_tile(
    sizes: Sizes, inputs: Inputs, ring: Ring, me: Array, share: _Share, rows: _Rows, tile: Array,
    slot: Array, state: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The online softmax of one tile: the weighted values, the top exponent, the weights' sum."""
    acc, top, total = state
    factor = _LOG2_E if sizes.soft_cap is not None else sizes.scale * _LOG2_E
    masked = (tile >= share.full) | (tile < share.masked_until)

    def multiply(product: Any) -> Array:
        plgpu.wgmma(product, ring.q.at[me], ring.k.at[slot].T)
        return product[...]

    plgpu.barrier_wait(ring.k_full.at[slot])
    score = pl.run_scoped(
        multiply, plgpu.WGMMAAccumulatorRef((BLOCK, sizes.shape.tile), jnp.float32)
    )
    plgpu.barrier_arrive(ring.k_empty.at[slot])
    if sizes.soft_cap is not None:
        score = sizes.soft_cap * jnp.tanh(score * (sizes.scale / sizes.soft_cap))
    score = lax.cond(
        masked, lambda s: _hide(sizes, inputs, share, rows, tile, s), lambda s: s, score
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
    pl.when(masked)(lambda: _clean(sizes, inputs, share, tile, ring.v.at[slot]))
    result: Any = pl.run_state(accumulate)(plgpu.WGMMAAccumulatorRef.init(acc))
    plgpu.barrier_arrive(ring.v_empty.at[slot])
    return result, higher, total


def _finish(
    sizes: Sizes, inputs: Inputs, share: _Share, rows: _Rows, acc: Array, top: Array, total: Array
) -> None:
    """Writes a unit's result: to the output, or as a partial one."""
    total = jnp.where(rows.limit > 0, total, 0.0)  # a padding query may have seen whole tiles
    some = total > 0
    inverse = jnp.where(some, 1.0 / jnp.where(some, total, 1.0), 0.0)
    lse = jnp.where(some, top * (1 / _LOG2_E) + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
    out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
    sizes_of = {"group": sizes.shape.group, "heads": sizes.heads, "dim": sizes.dim}
    where = (share.head * sizes.shape.group, share.row, share.rows)

    @pl.when(share.direct > 0)
    def _() -> None:
        values = out.astype(inputs.out.dtype)
        store_rows(inputs.out, inputs.lse, None, values, lse, share.query, *where, **sizes_of)

    @pl.when(share.direct <= 0)
    def _() -> None:
        refs = inputs.part, inputs.part_lse, inputs.slot
        store_rows(*refs, out, lse, share.place, *where, **sizes_of)
