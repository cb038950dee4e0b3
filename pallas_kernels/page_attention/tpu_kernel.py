"""The body of the TPU kernel of `page_attention`.

A grid step owns some KV heads and some rows (queries times G, see `tpu_sizes`). It keeps their
results in VMEM and walks over all items: the pages of a block travel from HBM while those of the
blocks before it are computed, and each block is merged into the rows that its item touches. The
core does one block after the other, so no two items ever meet in a row, however they overlap.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvjax.pallas_kernels.page_attention.merge import guard
from kvjax.pallas_kernels.page_attention.tpu_sizes import LANES, SUBLANES, ClassSizes, Sizes

__all__ = ["Plane", "Refs", "Rule", "attend_kernel"]

Array = jax.Array

# The position of a slot that nobody sees.
_NEVER = 2**31 - 1
_UNROLL = 8
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is static about a call besides its sizes."""

    scale: float
    soft_cap: float | None
    windowed: bool
    exact: bool  # float32 products


class Plane(NamedTuple):
    """True positions: HBM int32[N, P], and VMEM int32[slots, block_pages, P]."""

    position: Any
    block: Any


class Refs(NamedTuple):
    """All that the kernel touches.

    Attributes:
        numbers: SMEM int32[2 + classes]: the page's layer, the window, the items of each class.
        index: SMEM int32[5 * I], the items of all classes.
        pages: SMEM int32[J * B * M], the table of the layer's group.
        length: SMEM int32[J * B].
        q: VMEM float32[heads, rows, D].
        q_position: VMEM int32[rows, 128], the same in all lanes.
        k: HBM [N, R, C, P, D].
        v: HBM [N, R, C, P, D].
        out: VMEM float32[heads, rows, D].
        lse: VMEM float32[heads, 1, rows].
        total: VMEM float32[heads, rows, 128]: the lse so far, to base 2, in all lanes.
        k_block: VMEM [slots, heads, block_pages, P, D].
        v_block: VMEM [slots, heads, block_pages, P, D].
        key_position: VMEM int32[1, block_pages * P], of the block that is computed.
        holes: SMEM int32[slots]: how many of a block's entries are no page.
        sems: a DMA semaphore a slot.
        plane: where the pool tracks positions.
    """

    numbers: Any
    index: Any
    pages: Any
    length: Any
    q: Any
    q_position: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    total: Any
    k_block: Any
    v_block: Any
    key_position: Any
    holes: Any
    sems: Any
    plane: Plane | None


class _Place(NamedTuple):
    """A block: which of an item's; int32 scalars."""

    item: Array
    block: Array


class _Span(NamedTuple):
    """What a block reads and whom it serves; int32 scalars.

    Attributes:
        row: of the table, the head group's included.
        first: its first entry of the table's row.
        pages: entries, 0: nothing to do.
        last: whether it is its item's last block.
        begin: the first row of state that it serves, may be negative.
        end: the row after the last.
    """

    row: Array
    first: Array
    pages: Array
    last: Array
    begin: Array
    end: Array


def attend_kernel(refs: Refs, sizes: Sizes, rule: Rule, table: tuple[int, int]) -> None:
    """One grid step, (heads, rows).

    Args:
        refs: see there.
        sizes: static.
        rule: static.
        table: (B, M).
    """
    refs.out[...] = jnp.zeros_like(refs.out)
    refs.total[...] = jnp.full_like(refs.total, -jnp.inf)
    # Interpret mode has program ids only here, outside of all branches.
    head, row = pl.program_id(0) * sizes.heads, pl.program_id(1) * sizes.rows
    for number, cls in enumerate(sizes.classes):
        _Class(refs, sizes, rule, table, cls, refs.numbers[2 + number], head, row).run()
    _write_lse(refs, sizes)


def _write_lse(refs: Refs, sizes: Sizes) -> None:
    """From sublanes into lanes, so that what goes to HBM is not padded 128-fold."""

    def part(i: Array, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        for head in range(sizes.heads):
            refs.lse[head, :, rows] = refs.total[head, rows].T[:1] / _LOG2_E

    jax.lax.fori_loop(0, sizes.rows // LANES, part, None)


@dataclasses.dataclass(frozen=True)
class _Class:
    """The walk over the items of one size class."""

    refs: Refs
    sizes: Sizes
    rule: Rule
    table: tuple[int, int]
    cls: ClassSizes
    count: Array
    head: Array  # the first of the grid step, of K
    row: Array  # likewise

    def run(self) -> None:
        slots = self.sizes.slots
        zero = jnp.int32(0)
        ahead = jax.lax.fori_loop(
            0, slots - 1, lambda slot, ahead: self._fetch(ahead, slot), _Place(zero, zero)
        )

        def step(carry: tuple[_Place, _Place, Array]) -> tuple[_Place, _Place, Array]:
            here, ahead, slot = carry
            ahead = self._fetch(ahead, jnp.where(slot == 0, slots - 1, slot - 1))
            span = self._span(here)
            pl.when(span.pages > 0)(lambda: self._compute(span, slot))
            return self._next(here, span), ahead, jnp.where(slot == slots - 1, 0, slot + 1)

        jax.lax.while_loop(lambda carry: carry[0].item < self.count, step,
                           (_Place(zero, zero), ahead, zero))  # fmt: skip

    def _span(self, place: _Place) -> _Span:
        """An item without pages, or without rows here, is one block of no entries."""
        refs, sizes = self.refs, self.sizes
        at = 5 * (self.cls.start + place.item)
        row, first, end, first_query, end_query = (refs.index[at + i] for i in range(5))
        row = self.head // refs.k.shape[2] * self.table[0] + row
        page_size = refs.k.shape[3]
        end = jnp.minimum(end, pl.cdiv(refs.length[row], page_size))
        begin = first_query * sizes.group - self.row
        stop = end_query * sizes.group - self.row
        end = jnp.where((stop > 0) & (begin < sizes.rows), end, first)
        first = first + place.block * sizes.block_pages
        count = jnp.clip(end - first, 0, sizes.block_pages)
        return _Span(row, first, count, end <= first + sizes.block_pages, begin, stop)

    def _next(self, place: _Place, span: _Span) -> _Place:
        item = jnp.where(span.last, place.item + 1, place.item)
        return _Place(item, jnp.where(span.last, 0, place.block + 1))

    def _fetch(self, place: _Place, slot: Array) -> _Place:
        """Starts the copies of a block, if it is one; returns the place after it."""

        def start() -> _Place:
            span = self._span(place)
            self.refs.holes[slot] = self._sum(span.pages, lambda i: self._copy(span, i, slot, True))
            return self._next(place, span)

        return jax.lax.cond(place.item < self.count, start, lambda: place)

    def _sum(self, count: Array, term: Callable[[Array], Array]) -> Array:
        """Of `term(i)` for i below `count`, several at a time: scalar work is slow one by one."""
        unroll = min(_UNROLL, self.sizes.block_pages)

        def some(i: Array, total: Array) -> Array:
            return total + sum(term(i * unroll + n) for n in range(unroll))

        whole, total = count // unroll, jnp.int32(0)
        if unroll > 1:
            total = jax.lax.fori_loop(0, whole, some, total)
        begin = whole * unroll if unroll > 1 else 0
        return jax.lax.fori_loop(begin, count, lambda i, total: total + term(i), total)

    def _copy(self, span: _Span, i: Array, slot: Array, start: bool) -> Array:
        """Starts, or awaits, the copies of a block's i-th page; 1 if the entry is no page."""
        refs, sizes = self.refs, self.sizes
        # What is awaited counts bytes: any page will do.
        entry = self._page(span, i) if start else jnp.int32(0)
        page = jnp.clip(entry, 0, refs.k.shape[0] - 1)
        begin = self.head % refs.k.shape[2]
        source = (page, refs.numbers[0], pl.ds(begin, sizes.heads))
        pairs = [(refs.k.at[source], refs.k_block.at[slot, :, i]),
                 (refs.v.at[source], refs.v_block.at[slot, :, i])]  # fmt: skip
        if refs.plane is not None:
            target = refs.plane.block.at[slot, pl.ds(i, 1)]
            pairs.append((refs.plane.position.at[pl.ds(page, 1)], target))
        for pair in pairs:
            copy = pltpu.make_async_copy(*pair, refs.sems.at[slot])
            copy.start() if start else copy.wait()
        return (entry >= refs.k.shape[0]).astype(jnp.int32)

    def _page(self, span: _Span, i: Array) -> Array:
        return self.refs.pages[span.row * self.table[1] + span.first + i]

    def _compute(self, span: _Span, slot: Array) -> None:
        self._sum(span.pages, lambda i: self._copy(span, i, slot, False))
        holes = self.refs.holes[slot]
        tokens = self.refs.key_position.shape[1]
        live = self.refs.length[span.row] - span.first * self.refs.k.shape[3]
        live = jnp.minimum(live, span.pages * self.refs.k.shape[3])
        self._locate(span, slot, live)
        pl.when(holes > 0)(lambda: self._cut_holes(span))
        if self.refs.plane is None:
            pl.when((holes > 0) | (live < tokens))(lambda: self._clean(slot))
        else:
            self._clean(slot)
        self._attend(span, slot)

    def _locate(self, span: _Span, slot: Array, live: Array) -> None:
        """The true positions of the block's slots, the first `live` of which are in use."""
        refs = self.refs
        place = jax.lax.broadcasted_iota(jnp.int32, refs.key_position.shape, 1)
        position = span.first * refs.k.shape[3] + place
        if refs.plane is not None:
            position = _in_a_line(refs.plane.block[slot])
            position = jnp.where(position < 0, _NEVER, position)
        refs.key_position[...] = jnp.where(place < live, position, _NEVER)

    def _cut_holes(self, span: _Span) -> None:
        """Entries that are no page: their copies brought another page."""
        refs = self.refs
        size = refs.k.shape[3]
        place = jax.lax.broadcasted_iota(jnp.int32, refs.key_position.shape, 1)

        def cut(i: Array, carry: None) -> None:
            hole = self._page(span, i) >= refs.k.shape[0]
            inside = (place >= i * size) & (place < jnp.where(hole, (i + 1) * size, 0))
            refs.key_position[...] = jnp.where(inside, _NEVER, refs.key_position[...])

        jax.lax.fori_loop(0, span.pages, cut, None)

    def _clean(self, slot: Array) -> None:
        """Zeroes the values of dead slots: they may hold NaN, and 0 * NaN is NaN."""
        refs = self.refs
        tokens = refs.key_position.shape[1]
        live = (refs.key_position[...] != _NEVER).astype(jnp.float32)
        live = jnp.broadcast_to(live, (LANES, tokens)).T[:, :1] > 0  # from lanes to sublanes
        for head in range(self.sizes.heads):
            block = refs.v_block[slot, head]
            values = block.reshape(tokens, -1).astype(jnp.float32)
            values = jnp.where(live, values, 0.0).astype(block.dtype)
            refs.v_block[slot, head] = values.reshape(block.shape)

    def _attend(self, span: _Span, slot: Array) -> None:
        """Merges a block into the rows that it serves, in pieces."""
        cls, sizes = self.cls, self.sizes
        begin = jnp.clip(span.begin // SUBLANES * SUBLANES, 0, sizes.rows - cls.rows)

        def piece(i: Array, carry: None) -> None:
            part, head = i % (cls.rows // cls.piece_rows), i // (cls.rows // cls.piece_rows)
            heads = pl.ds(head * cls.piece_heads, cls.piece_heads)
            start = pl.multiple_of(begin + part * cls.piece_rows, SUBLANES)
            self._merge(span, slot, heads, start)

        count = cls.rows // cls.piece_rows * (sizes.heads // cls.piece_heads)
        if count == 1:
            piece(jnp.int32(0), None)
        else:
            jax.lax.fori_loop(0, count, piece, None)

    def _merge(self, span: _Span, slot: Array, heads: slice | pl.Slice, start: Array) -> None:
        """As `merge`, of what the rows have and a block's keys, for some heads and rows.

        What there is one of a row stands in all lanes: to spread a single lane is slow.
        """
        refs, rule = self.refs, self.rule
        rows = pl.ds(start, self.cls.piece_rows)
        seen = self._seen(span, start, rows)
        k, v = (
            ref[slot, heads].reshape(self.cls.piece_heads, seen.shape[1], -1)
            for ref in (refs.k_block, refs.v_block)
        )
        score = self._product(refs.q[heads, rows], k, 2)
        if rule.soft_cap is None:
            score = score * (rule.scale * _LOG2_E)
        else:
            score = jnp.tanh(score * (rule.scale / rule.soft_cap)) * (rule.soft_cap * _LOG2_E)
        score = jnp.where(seen[None], score, -jnp.inf)
        lse = refs.total[heads, rows]
        top = guard(jnp.maximum(lse, jnp.max(score, axis=2, keepdims=True)))
        weight, old = jnp.exp2(score - _widen(top, score.shape[2])), jnp.exp2(lse - top)
        total = old + jnp.sum(weight, axis=2, keepdims=True)
        some = total > 0
        part = 1.0 / jnp.where(some, total, 1.0)
        refs.total[heads, rows] = jnp.where(some, top - jnp.log(part) * _LOG2_E, -jnp.inf)
        before = refs.out[heads, rows] * _widen(old * part, refs.out.shape[2])
        added = self._product(weight, v, 1) * _widen(part, refs.out.shape[2])
        refs.out[heads, rows] = before + added

    def _seen(self, span: _Span, start: Array, rows: slice | pl.Slice) -> Array:
        """Which key each row sees, bool[rows, tokens]."""
        row = start + jax.lax.broadcasted_iota(jnp.int32, (self.cls.piece_rows, LANES), 0)
        query, key = self.refs.q_position[rows], self.refs.key_position[...]
        query = jnp.where((row >= span.begin) & (row < span.end), query, -1)
        query = _widen(query, key.shape[1])
        seen = key <= query
        if self.rule.windowed:
            seen = seen & (key > query - self.refs.numbers[1])
        return seen

    def _product(self, a: Array, b: Array, contract: int) -> Array:
        """Of every head: a float32[h, m, x] with axis `contract` of b, float32[h, m, y]."""
        dtype = jnp.float32 if self.rule.exact else b.dtype
        precision = "highest" if self.rule.exact else None
        return jax.lax.dot_general(
            a.astype(dtype), b.astype(dtype), (((2,), (contract,)), ((0,), (0,))),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip


def _widen(x: Array, width: int) -> Array:
    """From [..., 128], the same in all lanes, to [..., width]."""
    if width <= LANES:
        return x[..., :width]
    if width % LANES:
        return jnp.broadcast_to(x[..., :1], (*x.shape[:-1], width))
    return jnp.concatenate([x] * (width // LANES), axis=-1)


def _in_a_line(block: Array) -> Array:
    """From int32[pages, P] to [1, pages * P], below 2**24: products with ones move them exactly."""
    pages, size = block.shape
    tokens = pages * size

    def page_of(shape: tuple[int, int]) -> Array:
        token = jax.lax.broadcasted_iota(jnp.int32, shape, 1).astype(jnp.float32)
        return ((token + 0.5) * (1.0 / size)).astype(jnp.int32)

    inner = jax.lax.broadcasted_iota(jnp.int32, (size, tokens), 0)
    token = jax.lax.broadcasted_iota(jnp.int32, (size, tokens), 1)
    ones = (token - page_of((size, tokens)) * size == inner).astype(jnp.float32)
    spread = jnp.dot(block.astype(jnp.float32), ones, precision="highest")
    mine = page_of((pages, tokens)) == jax.lax.broadcasted_iota(jnp.int32, (pages, tokens), 0)
    return jnp.sum(jnp.where(mine, spread, 0.0), axis=0, keepdims=True).astype(jnp.int32)
