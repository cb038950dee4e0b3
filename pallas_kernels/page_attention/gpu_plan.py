"""What the GPU kernels need to know of a work list, computed once a step for all layers.

The kernels work on units: 64 or 128 rows (queries times query heads of one KV head) of one item.
A query that is in one item only is written straight to the output; the others go through partial
results, one place for each (item, query), which `gpu_merge` reads in the items' order. Nothing
here depends on how many units there are, so a query's result does not depend on its neighbours.

Letters beside those of the contract: I items of a class, Q queries an item, S pages an item,
U units of a class, E places for (item, query) over all classes, F fields of a unit.
"""

import dataclasses
import enum
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:  # work.py imports this module
    from kvjax.pallas_kernels.page_attention.work import Items, WorkList

__all__ = ["BLOCK", "NEVER", "ClassPlan", "Field", "Mode", "Plan", "Shape", "make_plan"]

Array = jax.Array

# Rows of one matrix product of a warpgroup.
BLOCK = 64
# The position of a slot that nobody sees.
NEVER = 2**31 - 1
# A consumer's last tile may go so far past a row's slots.
_PAST = 128


class Field(enum.IntEnum):
    """The columns of a unit."""

    ROW = 0  # of the table
    FIRST_PAGE = 1
    TILES = 2  # of keys, from the first page on
    FULL = 3  # the first tile that some query sees only in part
    FIRST_QUERY = 4
    FIRST_ROW = 5  # of the unit, among the item's rows
    ROWS = 6  # of the item
    STOP = 7  # the first slot that is not the item's
    LEAST_POSITION = 8  # of the unit's queries
    MOST_POSITION = 9
    LAST_ENTRY = 10  # of the table's row, that holds something for the unit
    HOLES = 11  # whether an entry, or where positions are true a slot, before `STOP` is none
    DIRECT = 12  # whether the result is written straight to the output
    PLACE = 13  # of the item's first query, in `ClassPlan.slot`


_FIELDS = 16


class Mode(enum.Enum):
    """What the two consumers of a thread block share."""

    HEADS = enum.auto()  # a row's pages: each has a KV head of its own
    BLOCKS = enum.auto()  # a head's keys: each has 64 rows of its own
    SINGLE = enum.auto()  # there is only one consumer


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of a class of items.

    Attributes:
        group: query heads a KV head.
        mode: see `Mode`.
        tile: keys of one step of a consumer.
        blocks: units an item.
    """

    group: int
    mode: Mode
    tile: int
    blocks: int

    @staticmethod
    def of(max_queries: int, group: int, heads_per_page: int, dim: int) -> "Shape":
        """The shape for items of so many queries."""
        rows = max_queries * group
        if rows > BLOCK:
            return Shape(group, Mode.BLOCKS, 128 if dim <= 128 else 64, -(-rows // (2 * BLOCK)))
        mode = Mode.SINGLE if heads_per_page % 2 else Mode.HEADS
        return Shape(group, mode, 128 if dim <= 64 else 64, 1)

    @property
    def rows(self) -> int:
        """Rows of a unit."""
        return BLOCK * (2 if self.mode is Mode.BLOCKS else 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassPlan:
    """The units of one class of items.

    Attributes:
        units: int32[L/R, K/C, U, F], the longest first.
        count: int32 scalar, how many of the U there are.
        slot: int32[I * Q], where the partial result of an (item, query) goes; -1: nowhere.
        shape: static.
    """

    units: Array
    count: Array
    slot: Array
    shape: Shape = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A work list made ready for the GPU.

    Attributes:
        classes: one for each of the work list's classes.
        merge: int32[T, 3]: a query that is not written straight to the output, its first partial
            result, and how many it has (none: the query is in no item).
        num_merges: int32 scalar, how many of the T there are.
        position: int32[L/R, K/C, B, M * P + 128], the true position of each slot, `NEVER` where
            nobody sees it; None: a slot's index is its position.
        page_size: P of the pool it was made for.
        max_partials: places for partial results.
    """

    classes: tuple[ClassPlan, ...]
    merge: Array
    num_merges: Array
    position: Array | None
    page_size: int = dataclasses.field(metadata={"static": True})
    max_partials: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class _Items:
    """A class of items with its unused ones made harmless; everything has the shape [I]."""

    row: Array
    first: Array
    end: Array
    query: Array
    queries: Array

    @staticmethod
    def of(items: "Items", rows: int, entries: int) -> "_Items":
        index, most = items.index, items.max_queries
        used = jnp.arange(index.shape[0], dtype=jnp.int32) < items.count
        row, first, end, query, last = (jnp.where(used, column, 0) for column in index.T)
        end = jnp.minimum(jnp.minimum(end, first + items.max_pages), entries)
        queries = jnp.clip(last - query, 0, most)
        return _Items(jnp.clip(row, 0, rows - 1), first, end, query, queries)


def make_plan(
    work: "WorkList", *, page_size: int, num_pages: int, group: int, heads_per_page: int,
    dim: int, max_partials: int | None = None, position: Array | None = None,
) -> Plan:  # fmt: skip
    """Makes a work list ready.

    Args:
        work: a `WorkList`.
        page_size: P.
        num_pages: N.
        group: H / K.
        heads_per_page: C.
        dim: D.
        max_partials: the most (item, query) pairs among queries that are in several items or
            among their items' other queries; None: as many as there can be.
        position: int32[N, P], true positions, those of this step's tokens among them.
    """
    if position is not None:
        position = _slot_positions(work, position)
    shapes = [Shape.of(i.max_queries, group, heads_per_page, dim) for i in work.items]
    items = [_Items.of(i, *work.pages.shape[2:]) for i in work.items]
    queries = [_queries(i, c.max_queries, work) for i, c in zip(items, work.items, strict=True)]
    num_queries = work.query_position.shape[0]
    everywhere = jnp.concatenate([q.reshape(-1) for q in queries])
    times = jnp.zeros(num_queries, jnp.int32).at[everywhere].add(1, mode="drop")
    alone = times == 1
    direct = [
        jnp.all(alone.at[q].get(mode="fill", fill_value=True), axis=1) for q in queries
    ]  # [I] each
    if max_partials is None:
        max_partials = everywhere.size
    partial = jnp.concatenate(
        [
            jnp.where(d[:, None], num_queries, q).reshape(-1)
            for q, d in zip(queries, direct, strict=True)
        ]
    )
    slots, merge, num_merges = _partials(partial, everywhere, num_queries, max_partials)
    slots = jnp.split(slots, np.cumsum([q.size for q in queries])[:-1])
    classes = tuple(
        _plan_class(work, c, i, q, d, s, shape, page_size, num_pages, position)
        for c, i, q, d, s, shape in zip(
            work.items, items, queries, direct, slots, shapes, strict=True
        )
    )
    return Plan(
        classes=classes, merge=merge, num_merges=num_merges, position=position,
        page_size=page_size, max_partials=max_partials,
    )  # fmt: skip


def _slot_positions(work: "WorkList", position: Array) -> Array:
    """See `Plan.position`; gathered once a step, so that the kernel finds them side by side."""
    num_pages, page_size = position.shape
    *tables, entries = work.pages.shape
    slots = entries * page_size
    own = position[jnp.minimum(work.pages, num_pages - 1)].reshape(*tables, slots)
    slot = jnp.arange(slots, dtype=jnp.int32)
    live = jnp.repeat(work.pages < num_pages, page_size, axis=-1) & (own >= 0)
    live = live & (jnp.broadcast_to(slot, own.shape) < work.length[..., None])
    pad = (*((0, 0) for _ in tables), (0, _PAST))
    return jnp.pad(jnp.where(live, own, NEVER), pad, constant_values=NEVER)


def _queries(items: _Items, most: int, work: "WorkList") -> Array:
    """The queries of each item, int32[I, Q]; T where there is none."""
    offset = jnp.arange(most, dtype=jnp.int32)[None]
    query = items.query[:, None] + offset
    num_queries = work.query_position.shape[0]
    there = (offset < items.queries[:, None]) & (query < num_queries)
    return jnp.where(there, query, num_queries)


def _partials(
    partial: Array, everywhere: Array, num_queries: int, room: int
) -> tuple[Array, Array, Array]:
    """Places for partial results, each query's side by side, in the items' order."""
    ones = jnp.where(partial < num_queries, 1, 0)
    many = jnp.zeros(num_queries, jnp.int32).at[partial].add(ones, mode="drop")
    start = jnp.cumsum(many) - many
    order = jnp.argsort(partial, stable=True)
    rank = jnp.zeros_like(partial).at[order].set(jnp.arange(partial.size, dtype=jnp.int32))
    slots = jnp.where((partial < num_queries) & (rank < room), rank, -1)
    written = jnp.zeros(num_queries, bool).at[jnp.where(ones, num_queries, everywhere)]
    written = written.set(True, mode="drop")
    (which,) = jnp.nonzero(~written, size=num_queries, fill_value=0)
    which = which.astype(jnp.int32)
    merge = jnp.stack([which, start[which], many[which]], axis=1)
    return slots, merge, jnp.sum(~written, dtype=jnp.int32)


def _plan_class(
    work: "WorkList", items: "Items", its: _Items, queries: Array, direct: Array, slot: Array,
    shape: Shape, page_size: int, num_pages: int, position: Array | None,
) -> ClassPlan:  # fmt: skip
    least, most = _positions(work.query_position, queries, its, shape)  # [I, blocks]
    number = jnp.arange(queries.shape[0], dtype=jnp.int32)
    first_row = jnp.arange(shape.blocks, dtype=jnp.int32) * shape.rows
    rows = its.queries * shape.group

    def units(pages: Array, length: Array, position: Array | None) -> Array:
        """Those of one table, pages int32[B, M], length int32[B], position: int32[U, F]."""
        first = its.first * page_size
        stop = jnp.minimum(length[its.row], its.end * page_size)
        if position is None:
            holes = _holes(pages, its, stop, items.max_pages, page_size, num_pages)
            until = jnp.minimum(stop[:, None], most + 1)
            seen_by_all = jnp.minimum(stop[:, None], least + 1) - first[:, None]
            seen_by_all = jnp.where(holes[:, None], 0, seen_by_all)
        else:
            room = items.max_pages * page_size
            holes, until, seen_by_all = _by_position(position, its, first, stop, room, least, most)
        tiles = -(-jnp.maximum(until - first[:, None], 0) // shape.tile)
        full = jnp.clip(seen_by_all // shape.tile, 0, tiles)
        last = jnp.maximum(-(-until // page_size) - 1, its.first[:, None])
        last = jnp.minimum(last, pages.shape[1] - 1)
        columns = {
            Field.ROW: its.row, Field.FIRST_PAGE: its.first, Field.TILES: tiles,
            Field.FULL: full, Field.FIRST_QUERY: its.query, Field.FIRST_ROW: first_row[None],
            Field.ROWS: rows, Field.STOP: stop, Field.LEAST_POSITION: least,
            Field.MOST_POSITION: most, Field.LAST_ENTRY: last, Field.HOLES: holes,
            Field.DIRECT: direct, Field.PLACE: number * items.max_queries,
        }  # fmt: skip
        table = jnp.zeros((_FIELDS, *tiles.shape), jnp.int32)
        for field, value in columns.items():
            value = value[:, None] if value.ndim == 1 else value
            table = table.at[field].set(jnp.broadcast_to(value, tiles.shape).astype(jnp.int32))
        there = first_row[None] < rows[:, None]
        order = jnp.argsort(jnp.where(there, -tiles, 1).reshape(-1), stable=True)
        return table.reshape(_FIELDS, -1).T[order]

    table = jax.vmap(jax.vmap(units))(work.pages, work.length, position)
    count = jnp.sum(first_row[None] < rows[:, None], dtype=jnp.int32)
    return ClassPlan(units=table, count=count, slot=slot, shape=shape)


def _positions(position: Array, queries: Array, its: _Items, shape: Shape) -> tuple[Array, Array]:
    """The least and the most true position among each unit's queries, int32[I, blocks]."""
    own = position.at[queries].get(mode="fill", fill_value=-1)[:, None]  # [I, 1, Q]
    first = np.arange(shape.blocks) * shape.rows // shape.group
    end = -(-(np.arange(shape.blocks) + 1) * shape.rows // shape.group)
    offset = np.arange(queries.shape[1])
    inside = (offset >= first[:, None]) & (offset < end[:, None])  # [blocks, Q]
    real = jnp.asarray(inside)[None] & (own >= 0)
    least = jnp.min(jnp.where(real, own, np.iinfo(np.int32).max - 1), axis=2)
    return least, jnp.max(jnp.where(real, own, -1), axis=2)


def _by_position(
    position: Array, its: _Items, first: Array, stop: Array, room: int, least: Array, most: Array
) -> tuple[Array, Array, Array]:
    """What the true positions of items' slots say, of which each item has up to `room`.

    Returns:
        Whether an item has a dead slot, bool[I]; the slot after the last that some query of a unit
        sees, int32[I, blocks]; how many of the first slots all of them see, int32[I, blocks].
    """
    offset = jnp.arange(room, dtype=jnp.int32)[None]
    slot = first[:, None] + offset
    inside = slot < stop[:, None]
    key = position[its.row[:, None], jnp.minimum(slot, position.shape[1] - 1)]
    key = jnp.where(inside, key, NEVER)
    offset = jnp.broadcast_to(offset, key.shape)[:, None]
    some, every = key[:, None] <= most[..., None], key[:, None] <= least[..., None]
    until = first[:, None] + jnp.max(jnp.where(some, offset + 1, 0), axis=2)
    seen_by_all = jnp.min(jnp.where(every, room, offset), axis=2)
    return jnp.any(inside & (key == NEVER), axis=1), until, seen_by_all


def _holes(
    pages: Array, its: _Items, stop: Array, most: int, page_size: int, num_pages: int
) -> Array:
    """Which items have an entry in use that is no page, bool[I]."""
    entry = its.first[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
    page = pages[its.row[:, None], jnp.minimum(entry, pages.shape[1] - 1)]
    return jnp.any((entry * page_size < stop[:, None]) & (page >= num_pages), axis=1)
