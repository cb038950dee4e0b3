"""The attention kernel for Hopper: persistent thread blocks that walk over a plan's units.

A thread block is a producer warpgroup, which copies pages into a ring in shared memory, and one
or two consumers, which multiply. Scores and weights never leave the consumers' registers. Queries
lie in shared memory: where they were held in registers, the assembler of CUDA 13.0 gave queries
and weights the same ones if both had the same size, as if queries were not needed again.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kvjax.pallas_kernels.page_attention.gpu_plan import BLOCK, Field, Mode, Shape
from kvjax.pallas_kernels.page_attention.gpu_rows import load_per_row, load_rows, store_rows

__all__ = ["Sizes", "attend_units"]

Array = jax.Array

_LOG2_E = math.log2(math.e)
# Below every score, and finite: the difference of two infinities would be no number.
_LOWEST = -1e30
_COLUMN = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """All that a kernel is compiled for, beside the shapes of its arguments.

    Attributes:
        shape: of the class of items.
        heads: H.
        dim: D.
        page_size: P.
        layers_per_page: R.
        heads_per_page: C.
        head_groups: K/C.
        scale: of the scores.
        soft_cap: of the scores, or None.
        windowed: whether there is a sliding window.
        blocks: thread blocks, one a multiprocessor.
    """

    shape: Shape
    heads: int
    dim: int
    page_size: int
    layers_per_page: int
    heads_per_page: int
    head_groups: int
    scale: float
    soft_cap: float | None
    windowed: bool
    blocks: int

    @property
    def consumers(self) -> int:
        """Consumer warpgroups of a thread block."""
        return 1 if self.shape.mode is Mode.SINGLE else 2

    @property
    def head_units(self) -> int:
        """Thread blocks' shares of one unit: KV heads, or pairs of them."""
        kv_heads = self.heads_per_page * self.head_groups
        return kv_heads // 2 if self.shape.mode is Mode.HEADS else kv_heads

    @property
    def stages(self) -> int:
        """Places in the ring: 128 KB of keys and values hide the memory's latency."""
        return (128 * 1024) // (4 * self.shape.tile * self.dim)

    @property
    def copies(self) -> int:
        """Pages that a tile spans; a larger page holds several tiles."""
        return max(1, self.shape.tile // self.page_size)

    @property
    def slots_a_tile(self) -> int:
        """Places in the ring that one tile takes: one for each head that is read."""
        return 2 if self.shape.mode is Mode.HEADS else 1

    @property
    def swizzle(self) -> int:
        """Bytes of the widest swizzle that divides a row."""
        return next(s for s in (128, 64, 32) if self.dim * 2 % s == 0)


def _i32(value: int) -> Array:
    return jnp.int32(value)


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """References in global memory; see `attend_units`."""

    layer: Any
    window: Any
    count: Any
    q: Any
    k: Any
    v: Any
    pages: Any
    units: Any
    position: Any
    slot: Any
    out: Any
    lse: Any
    part: Any
    part_lse: Any

    def group(self, sizes: Sizes) -> Array:
        """The table's layer group."""
        return lax.div(self.layer[0], _i32(sizes.layers_per_page))


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Shared memory and its barriers, one of each kind for each place in the ring.

    The queries `q` [consumers, 64, D] have none: only their consumer touches them.
    """

    q: Any
    k: Any
    v: Any
    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Where a unit's fields are read from."""

    inputs: _Inputs
    group: Array
    heads: Array
    number: Array

    def __getitem__(self, field: Field) -> Array:
        return self.inputs.units[self.group, self.heads, self.number, int(field)]


def _share(sizes: Sizes, total: Array) -> Array:
    """How many of all (unit, head) pairs fall to this thread block."""
    me, blocks = lax.axis_index("block"), _i32(sizes.blocks)
    turns, rest = lax.div(total, blocks), lax.rem(total, blocks)
    place = jnp.where(lax.rem(turns, _i32(2)) == 0, me, blocks - 1 - me)
    return turns + jnp.where(place < rest, 1, 0)


def _pick(sizes: Sizes, turn: Array) -> tuple[Array, Array]:
    """The unit and its head share of this thread block's n-th turn.

    Units are dealt like cards, the longest first, and in alternating direction, so that all
    thread blocks get about the same.
    """
    me, blocks = lax.axis_index("block"), _i32(sizes.blocks)
    place = jnp.where(lax.rem(turn, _i32(2)) == 0, me, blocks - 1 - me)
    flat = turn * blocks + place
    return lax.div(flat, _i32(sizes.head_units)), lax.rem(flat, _i32(sizes.head_units))


def _first_tile(sizes: Sizes, unit: _Unit, window: Array, tiles: Array) -> Array:
    """The first tile that the window of some query reaches into."""
    if not sizes.windowed:
        return _i32(0)
    first_slot = unit[Field.FIRST_PAGE] * sizes.page_size
    reach = unit[Field.LEAST_POSITION] - window + 1 - first_slot
    before = lax.div(jnp.maximum(reach, 0), _i32(sizes.shape.tile))
    return jnp.where(window > 0, jnp.minimum(before, tiles), 0)


class _Task(NamedTuple):
    """What the producer needs to know of a unit, in registers."""

    head: Array  # the first of its KV heads
    row: Array
    first_page: Array
    last_entry: Array
    first_tile: Array
    tiles: Array


def _task(sizes: Sizes, inputs: _Inputs, turn: Array) -> _Task:
    number, share = _pick(sizes, turn)
    head = share * sizes.slots_a_tile
    heads = lax.div(head, _i32(sizes.heads_per_page))
    # The turn after the last one is asked for too.
    number = jnp.minimum(number, inputs.units.shape[2] - 1)
    unit = _Unit(inputs, inputs.group(sizes), heads, number)
    tiles = unit[Field.TILES]
    first = _first_tile(sizes, unit, inputs.window[0], tiles)
    return _Task(
        head, unit[Field.ROW], unit[Field.FIRST_PAGE], unit[Field.LAST_ENTRY], first, tiles
    )


def _pages(sizes: Sizes, inputs: _Inputs, task: _Task, tile: Array) -> list[Array]:
    """The pages that hold a tile."""
    heads = lax.div(task.head, _i32(sizes.heads_per_page))
    entry = task.first_page + lax.div(tile * sizes.shape.tile, _i32(sizes.page_size))
    num_pages = inputs.k.shape[0] // (sizes.layers_per_page * sizes.heads_per_page)
    found = []
    for j in range(sizes.copies):
        # Entries behind the last one are read as it: their keys are masked, and it is near.
        column = jnp.minimum(entry + j, task.last_entry)
        page = inputs.pages[inputs.group(sizes), heads, task.row, column]
        found.append(jnp.minimum(page, num_pages - 1))
    return found


def _copy(
    sizes: Sizes, inputs: _Inputs, ring: _Ring, task: _Task, tile: Array, n: Array, pages: list
) -> None:
    """Copies a tile, of each head that is read, into the next places of the ring."""
    per_page, length = sizes.heads_per_page, min(sizes.shape.tile, sizes.page_size)
    inner = lax.rem(inputs.layer[0], _i32(sizes.layers_per_page))
    at = pl.multiple_of(lax.rem(tile * sizes.shape.tile, _i32(sizes.page_size)), length)
    for w in range(sizes.slots_a_tile):
        slot = lax.rem(n * sizes.slots_a_tile + w, _i32(sizes.stages))
        head = lax.rem(task.head + w, _i32(per_page))
        for plane, place, full, empty in (
            (inputs.k, ring.k, ring.k_full, ring.k_empty),
            (inputs.v, ring.v, ring.v_full, ring.v_empty),
        ):
            plgpu.barrier_wait(empty.at[slot])
            for j, page in enumerate(pages):
                index = (page * sizes.layers_per_page + inner) * per_page + head
                source = plane.at[index]
                if length < sizes.page_size:
                    source = plane.at[index, pl.ds(at, length)]
                target = place.at[slot, pl.ds(j * length, length)]
                plgpu.copy_gmem_to_smem(source, target, full.at[slot])


def _produce(sizes: Sizes, inputs: _Inputs, ring: _Ring, turns: Array) -> None:
    """Copies every tile's pages into the ring, in the order in which the consumers take them.

    What the next tile and the next unit need is read before it is waited for a place.
    """

    def unit_body(turn: Array, carry: tuple) -> tuple:
        n, task, pages = carry
        following = _task(sizes, inputs, turn + 1)

        def tile_body(tile: Array, carry: tuple) -> tuple:
            n, pages = carry
            more = tile + 1 < task.tiles
            source = _Task(*(jnp.where(more, a, b) for a, b in zip(task, following, strict=True)))
            ahead = _pages(sizes, inputs, source, jnp.where(more, tile + 1, following.first_tile))
            _copy(sizes, inputs, ring, task, tile, n, pages)
            return n + 1, ahead

        n, pages = lax.fori_loop(task.first_tile, task.tiles, tile_body, (n, pages))
        pages = lax.cond(
            task.first_tile < task.tiles,
            lambda: pages,
            lambda: _pages(sizes, inputs, following, following.first_tile),
        )
        return n, following, pages

    first = _task(sizes, inputs, _i32(0))
    pages = _pages(sizes, inputs, first, first.first_tile)
    lax.fori_loop(_i32(0), turns, unit_body, (_i32(0), first, pages))


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


def _load(
    sizes: Sizes, inputs: _Inputs, queries: Any, unit: _Unit, head: Array, row: Array
) -> _Rows:
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
    lower, masked_until = None, _i32(0)
    if sizes.windowed:
        window = inputs.window[0]
        lower = position + jnp.where(window > 0, 1 - window, -(2**30))
        reach = unit[Field.MOST_POSITION] - window + 1 - first_slot
        tiles = lax.div(jnp.maximum(reach, 0) + sizes.shape.tile - 1, _i32(sizes.shape.tile))
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
    sizes: Sizes, inputs: _Inputs, unit: _Unit, tile: Array, shape: tuple[int, int], axis: int
) -> Array:
    """Which slots of a tile lie in a page at all, bool[shape] along `axis`."""
    size = sizes.page_size
    num_pages = inputs.k.shape[0] // (sizes.layers_per_page * sizes.heads_per_page)
    offset = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
    start = tile * sizes.shape.tile
    entry = unit[Field.FIRST_PAGE] + lax.div(start, _i32(size))
    inside = None
    for j in range(sizes.copies):
        column = jnp.minimum(entry + j, unit[Field.LAST_ENTRY])
        page = inputs.pages[unit.group, unit.heads, unit[Field.ROW], column]
        # A page that is none ends before it begins.
        end = jnp.where(page < num_pages, (j + 1) * size, j * size)
        here = (offset >= j * size) & (offset < end)
        inside = here if inside is None else inside | here
    return inside


def _hide(
    sizes: Sizes, inputs: _Inputs, unit: _Unit, rows: _Rows, tile: Array, score: Array
) -> Array:
    seen = _seen(sizes, rows, tile)
    score = jnp.where(seen, score, -jnp.inf)
    return lax.cond(
        unit[Field.HOLES] > 0,
        lambda s: jnp.where(_in_pages(sizes, inputs, unit, tile, s.shape, 1), s, -jnp.inf),
        lambda s: s,
        score,
    )


def _clean(
    sizes: Sizes, inputs: _Inputs, unit: _Unit, rows: _Rows, tile: Array, values: Any
) -> None:
    """Zeroes the values of slots that are not in use: 0 times what they may hold need not be 0."""
    shape = (sizes.shape.tile, sizes.dim)
    left = rows.stop - rows.first_slot - tile * sizes.shape.tile

    def zero(live: Array) -> None:
        held = plgpu.load(values, layout=plgpu.Layout.WGMMA)
        values[...] = jnp.where(live, held, jnp.zeros((), held.dtype))
        plgpu.commit_smem()

    @pl.when(left < sizes.shape.tile)
    def _() -> None:
        offset = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        zero(offset < left)

    @pl.when(unit[Field.HOLES] > 0)
    def _() -> None:
        zero(_in_pages(sizes, inputs, unit, tile, shape, 0))


def _consume(sizes: Sizes, inputs: _Inputs, ring: _Ring, turns: Array, me: Array) -> None:
    shape, dim = sizes.shape, sizes.dim
    group, window = inputs.group(sizes), inputs.window[0]
    factor = _LOG2_E if sizes.soft_cap is not None else sizes.scale * _LOG2_E
    own_head = shape.mode is Mode.HEADS

    def tile_body(tile: Array, carry: tuple, unit: _Unit, rows: _Rows) -> tuple:
        acc, top, total, n = carry
        place = n * 2 + me if own_head else n
        slot = lax.rem(place, _i32(sizes.stages))
        masked = (tile >= rows.masked_from) | (tile < rows.masked_until)

        def multiply(product: Any) -> Array:
            plgpu.wgmma(product, ring.q.at[me], ring.k.at[slot].T)
            return product[...]

        plgpu.barrier_wait(ring.k_full.at[slot])
        score = pl.run_scoped(multiply, plgpu.ACC((BLOCK, shape.tile), jnp.float32))
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
        acc = pl.run_state(accumulate)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(ring.v_empty.at[slot])
        return acc, higher, total, n + 1

    def unit_body(turn: Array, n: Array) -> Array:
        number, share = _pick(sizes, turn)
        head = share * 2 + me if own_head else share
        unit = _Unit(inputs, group, lax.div(head, _i32(sizes.heads_per_page)), number)
        row = unit[Field.FIRST_ROW] + (me * BLOCK if shape.mode is Mode.BLOCKS else 0)
        rows = _load(sizes, inputs, ring.q.at[me], unit, head, row)
        tiles = unit[Field.TILES]
        acc = plgpu.layout_cast(jnp.zeros((BLOCK, dim), jnp.float32), plgpu.Layout.WGMMA)
        top = plgpu.layout_cast(jnp.full((BLOCK,), _LOWEST, jnp.float32), _COLUMN)
        total = plgpu.layout_cast(jnp.zeros((BLOCK,), jnp.float32), _COLUMN)
        acc, top, total, n = lax.fori_loop(
            _first_tile(sizes, unit, window, tiles), tiles,
            lambda tile, carry: tile_body(tile, carry, unit, rows), (acc, top, total, n),
        )  # fmt: skip
        _finish(sizes, inputs, unit, head, row, rows, acc, top, total)
        return n

    lax.fori_loop(_i32(0), turns, unit_body, _i32(0))


def _finish(
    sizes: Sizes, inputs: _Inputs, unit: _Unit, head: Array, row: Array, rows: _Rows, acc: Array,
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


def _body(sizes: Sizes, *refs: Any) -> None:
    inputs, ring = _Inputs(*refs[:14]), _Ring(*refs[14:])
    me = lax.axis_index("warpgroup")
    turns = _share(sizes, inputs.count[0] * sizes.head_units)

    @pl.when(me == sizes.consumers)
    def _() -> None:
        plgpu.set_max_registers(56, action="decrease")
        _produce(sizes, inputs, ring, turns)

    @pl.when(me < sizes.consumers)
    def _() -> None:
        plgpu.set_max_registers(224, action="increase")

        # The ring begins empty. Where consumers share its places each must say so.
        @pl.when((me == 0) | (sizes.shape.mode is Mode.BLOCKS))
        def _() -> None:
            for slot in range(sizes.stages):
                plgpu.barrier_arrive(ring.k_empty.at[slot])
                plgpu.barrier_arrive(ring.v_empty.at[slot])

        _consume(sizes, inputs, ring, turns, me)


def attend_units(
    sizes: Sizes, layer: Array, window: Array, count: Array, q: Array, k: Array, v: Array,
    pages: Array, units: Array, position: Array, slot: Array, out: Any, lse: Any, part: Any,
    part_lse: Any,
) -> None:  # fmt: skip
    """Attention of a class's units; writes outputs and partial results in place.

    Args:
        sizes: static.
        layer: int32[1].
        window: int32[1].
        count: int32[1], how many units there are.
        q: [T, H, D].
        k: [N * R * C, P, D].
        v: [N * R * C, P, D].
        pages: int32[L/R, K/C, B, M].
        units: int32[L/R, K/C, U, F].
        position: int32[T].
        slot: int32[I * Q].
        out: reference to [T, H * D].
        lse: reference to float32[T, H].
        part: reference to float32[E, H * D].
        part_lse: reference to float32[E, H].
    """
    tile, dim, stages = sizes.shape.tile, sizes.dim, sizes.stages
    transforms = (
        plgpu.TilingTransform((8, sizes.swizzle // 2)),
        plgpu.SwizzleTransform(sizes.swizzle),
    )
    queries = plgpu.SMEM((sizes.consumers, BLOCK, dim), q.dtype, transforms=transforms)
    buffer = plgpu.SMEM((stages, tile, dim), k.dtype, transforms=transforms)
    full = plgpu.Barrier(num_arrivals=sizes.copies, num_barriers=stages)
    takers = 2 if sizes.shape.mode is Mode.BLOCKS else 1
    empty = plgpu.Barrier(num_arrivals=takers, num_barriers=stages)

    def page_attention(*refs: Any) -> None:
        _body(sizes, *refs)

    plgpu.kernel(
        page_attention,
        out_type=(),
        scratch_types=[queries, buffer, buffer, full, full, empty, empty],
        grid=(sizes.blocks,),
        grid_names=("block",),
        num_threads=sizes.consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(layer, window, count, q, k, v, pages, units, position, slot, out, lse, part, part_lse)
