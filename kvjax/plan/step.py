"""What a planner hands to the engine's step: arrays of a few declared shapes.

Letters: T tokens of a step, B rows that draw, I work items, P tokens a page, M pages a row may
hold, S steps that one call may run.
"""

import dataclasses
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from kvjax.plan.sharing import shared_pages

__all__ = ["Bucket", "Grid", "Run", "StepPlan", "cut_items", "pack"]

Array = np.ndarray
# A plan's arrays are numpy's where it is made, and JAX's inside of the step.
A = TypeVar("A")

# The most shared items that a query is in, on average of a step.
_SHARED_PER_QUERY = 2


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """One compiled shape.

    Attributes:
        tokens: T.
        rows: B.
        chunks: whether a row may bring several tokens of its prompt. Without chunks every row
            brings one, and the call may run several steps.
        steps: the most steps of a call; in a fixed grid, all of them.
        asks: in a fixed grid, whether a row may want more than the likeliest token.
    """

    tokens: int
    rows: int
    chunks: bool
    steps: int = 1
    asks: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The static sizes of planning.

    Attributes:
        page_size: P.
        max_rows: rows that can be seated at once.
        pages_per_row: M.
        row_buckets: sizes of decode-only steps, ascending; the last is `max_rows`.
        token_buckets: sizes of steps with prompt chunks, ascending; the last is the token budget.
        split_pages: a work item spans at most so many pages, counted from the row's start.
        tile_queries: a work item of a chunk spans at most so many queries.
        decode_steps: S, the most steps of a call in which every row brings one token.
        shared_pages: rows whose tables begin with the same pages read runs of at least so many
            pages once for all of them; 0: every row reads for itself.
        fixed: a call runs one step or all S, and what is asked for is part of its shape: more
            shapes, but no loop and no condition that depends on data. A GPU waits for its host at
            every such place.
        plain: whether, in a fixed grid, calls that want the likeliest tokens only have shapes of
            their own; without, they run as the others do.
    """

    page_size: int = 16
    max_rows: int = 64
    pages_per_row: int = 64
    row_buckets: tuple[int, ...] = (8, 64)
    token_buckets: tuple[int, ...] = (64, 512)
    split_pages: int = 16
    tile_queries: int = 32
    decode_steps: int = 8
    shared_pages: int = 0
    fixed: bool = False
    plain: bool = True

    def __post_init__(self) -> None:
        for name in ("row_buckets", "token_buckets"):
            sizes = getattr(self, name)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise ValueError(f"{name}={sizes} must be positive and ascending")
        if self.row_buckets[-1] != self.max_rows:
            raise ValueError(f"the last of {self.row_buckets=} must be {self.max_rows=}")
        if self.token_buckets[-1] < self.max_rows:
            raise ValueError(f"the last of {self.token_buckets=} must be {self.max_rows=} or more")

    @property
    def max_length(self) -> int:
        """Tokens that a row's pages can hold."""
        return self.pages_per_row * self.page_size

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Every shape that a step can have."""
        kinds = ((False, True) if self.plain else (True,)) if self.fixed else (None,)
        counts = {1, self.decode_steps} if self.fixed else {self.decode_steps}
        shapes = [(rows, rows, False, n) for rows in self.row_buckets for n in sorted(counts)]
        shapes += [(t, min(t, self.max_rows), True, 1) for t in self.token_buckets]
        return tuple(Bucket(*shape, asks) for shape in shapes for asks in kinds)

    def bucket(self, tokens: int, chunks: bool, steps: int = 1, asks: bool = False) -> Bucket:
        """The smallest shape that holds `tokens` and does what is asked."""
        return min(
            b
            for b in self.buckets
            if b.tokens >= tokens and b.chunks == chunks and b.steps >= steps
            and b.asks in (None, True, asks)
        )  # fmt: skip

    def steps(self, most: int) -> int:
        """How many steps a call should run in which rows may draw up to `most` tokens."""
        if not self.fixed:
            return max(1, min(most, self.decode_steps))
        # Steps beyond the last token of all rows cost as much as others.
        return self.decode_steps if 2 * most > self.decode_steps else 1

    def room_for_items(self, bucket: Bucket) -> tuple[int, int]:
        """The most work items (of single queries, of chunk tiles) that a step may need."""
        tiles = bucket.tokens // self.tile_queries + min(bucket.tokens // 2, self.max_rows)
        own = bucket.rows * self._splits, tiles * self._splits if bucket.chunks else 0
        return own[0], own[1] + self.room_for_shared(bucket)

    def room_for_shared(self, bucket: Bucket) -> int:
        """The most work items of pages that rows share; beyond, each row reads for itself."""
        if not self.shared_pages:
            return 0
        return (bucket.tokens // self.tile_queries + bucket.rows // 2) * self._splits

    def room_for_partials(self, tokens: int) -> int | None:
        """The most (work item, query) pairs of a step; None: as many as its items have room for."""
        return (self._splits + _SHARED_PER_QUERY) * tokens if self.shared_pages else None

    @property
    def _splits(self) -> int:
        return -(-self.pages_per_row // self.split_pages)

    def room_for_entries(self, bucket: Bucket) -> int:
        """The most table entries that a step may set."""
        if bucket.chunks:
            return bucket.tokens
        return bucket.rows * ((self.decode_steps + self.page_size - 2) // self.page_size + 1)


class StepPlan(NamedTuple, Generic[A]):
    """One call of the step as data. Unused places hold what the device drops.

    Attributes:
        token: int32[T], -1: the token that the row drew last, which is on the device.
        position: int32[T] true positions.
        row: int32[T] seat of each token; `max_rows` where there is none.
        write: bool[T], whether its key and value are written: not if they are there already.
        grow: int32[3, n]: row, entry, page: the table's new entries, made before anything else.
        singles: int32[I, 5] work items of rows that bring one token.
        num_singles: int32 scalar.
        tiles: int32[I', 5] work items of rows that bring a chunk, and of pages that rows share.
        num_tiles: int32 scalar.
        sample: int32[B], the place among the T tokens whose successor is drawn.
        sample_row: int32[B], `max_rows` where there is none.
        room: int32[B], how many tokens the row may draw in this call.
        steps: int32 scalar, how many the call runs; more than 1 only without chunks.
        target: int32[T], the token whose log-probability is wanted after this one; -1: none.
        logprobs: bool scalar, whether log-probabilities of drawn tokens are wanted.
        asks: bool scalar, whether a row wants more than the likeliest token, or a score.
    """

    token: A
    position: A
    row: A
    write: A
    grow: A
    singles: A
    num_singles: A
    tiles: A
    num_tiles: A
    sample: A
    sample_row: A
    room: A
    steps: A
    target: A
    logprobs: A
    asks: A

    @staticmethod
    def empty(grid: Grid, bucket: Bucket) -> "StepPlan[Array]":
        """A step that does nothing; also the shapes and dtypes to compile for."""
        tokens, rows = bucket.tokens, bucket.rows
        singles, tiles = grid.room_for_items(bucket)
        grow = np.zeros((3, grid.room_for_entries(bucket)), np.int32)
        grow[0] = grid.max_rows
        return StepPlan(
            token=np.zeros(tokens, np.int32),
            position=np.zeros(tokens, np.int32),
            row=np.full(tokens, grid.max_rows, np.int32),
            write=np.zeros(tokens, np.bool_),
            grow=grow,
            singles=np.zeros((singles, 5), np.int32),
            num_singles=np.zeros((), np.int32),
            tiles=np.zeros((tiles, 5), np.int32),
            num_tiles=np.zeros((), np.int32),
            sample=np.zeros(rows, np.int32),
            sample_row=np.full(rows, grid.max_rows, np.int32),
            room=np.zeros(rows, np.int32),
            steps=np.ones((), np.int32),
            target=np.full(tokens, -1, np.int32),
            logprobs=np.zeros((), np.bool_),
            asks=np.zeros((), np.bool_),
        )


class Run(NamedTuple):
    """What one row brings to a step.

    Attributes:
        row: its seat.
        start: the true position of the first token.
        tokens: the tokens, or [-1] for the one that it drew last.
        stored: how many of them, from the first on, are in shared pages already.
        pages: all pages of the row, with those of tokens drawn and brought in the same call.
        draws: how many tokens it draws in this call.
        targets: what to score, beginning with the first token's successor.
    """

    row: int
    start: int
    tokens: list[int]
    stored: int
    pages: list[int]
    draws: int
    targets: list[int]


def cut_items(
    rows: Array, pages: Array, first: Array, end: Array, split: int, begin: Array | None = None
) -> Array:
    """Cuts (row, page run, query run) into work items of at most `split` pages.

    Args:
        rows: int[n].
        pages: int[n], the page after the last that each reads.
        first: int[n], its first query.
        end: int[n], the query after its last.
        split: pages an item; cuts lie at its multiples, whatever else is in the batch.
        begin: int[n], the first page that each reads, if not the row's first.

    Returns:
        int32[I, 5], see `kvjax.pallas_kernels.page_attention.Items`.
    """
    begin = np.zeros_like(pages) if begin is None else begin
    before = begin // split
    splits = -(-pages // split) - before
    which = np.repeat(np.arange(len(rows)), splits)
    number = np.arange(len(which)) - np.repeat(np.cumsum(splits) - splits - before, splits)
    first_page = np.maximum(number * split, begin[which])
    end_page = np.minimum((number + 1) * split, pages[which])
    return np.stack(
        [rows[which], first_page, end_page, first[which], end[which]], 1, dtype=np.int32
    )


def pack(
    runs: list[Run], grid: Grid, steps: int = 1, asks: bool = False, tables: Array | None = None
) -> tuple[Bucket, StepPlan[Array]]:
    """Lays runs out in the smallest bucket that holds them, in the order given.

    Args:
        runs: at least one.
        grid: the static sizes.
        steps: that the call may run.
        asks: whether a row wants more than the likeliest token.
        tables: int32[max_rows, M], the pages of each seat before the step, if neighbours are to
            read the pages that they share together.
    """
    counts = np.array([len(run.tokens) for run in runs])
    starts = np.array([run.start for run in runs])
    rows = np.array([run.row for run in runs])
    ends = np.cumsum(counts)
    total = int(ends[-1])
    scored = any(run.targets for run in runs)
    chunks, asks = bool(counts.max() > 1) or scored, asks or scored
    bucket = grid.bucket(total, chunks, steps, asks)
    plan = StepPlan.empty(grid, bucket)
    plan.token[:total] = np.concatenate([run.tokens for run in runs])
    within = np.arange(total) - np.repeat(ends - counts, counts)
    plan.position[:total] = np.repeat(starts, counts) + within
    plan.row[:total] = np.repeat(rows, counts)
    plan.write[:total] = within >= np.repeat([run.stored for run in runs], counts)
    for run, end in zip(runs, ends.tolist(), strict=True):
        if run.targets:
            first = end - len(run.tokens)
            plan.target[first : first + len(run.targets)] = run.targets
    draws = np.array([run.draws for run in runs])
    drawn = np.flatnonzero(draws)
    plan.sample[: len(drawn)], plan.sample_row[: len(drawn)] = ends[drawn] - 1, rows[drawn]
    plan.room[: len(drawn)], plan.steps[...], plan.asks[...] = draws[drawn], steps, asks
    _fill_entries(plan, runs, grid)
    reach = starts + counts + np.maximum(draws - 1, 0)
    begin = np.zeros_like(starts)
    if tables is not None:
        begin = _fill_shared(plan, rows, starts, counts, tables, grid, bucket)
    _fill_items(plan, rows, starts, counts, ends, reach, grid, begin)
    return bucket, plan


def _fill_entries(plan: StepPlan[Array], runs: list[Run], grid: Grid) -> None:
    """The pages from the one that a run's first token falls in may be new to the table."""
    first = [run.start // grid.page_size for run in runs]
    new = [run.pages[entry:] for run, entry in zip(runs, first, strict=True)]
    counts = np.array([len(pages) for pages in new])
    total = int(counts.sum())
    within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    plan.grow[0, :total] = np.repeat([run.row for run in runs], counts)
    plan.grow[1, :total] = np.repeat(first, counts) + within
    plan.grow[2, :total] = [page for pages in new for page in pages]


def _fill_items(
    plan: StepPlan[Array], rows: Array, starts: Array, counts: Array, ends: Array, reach: Array,
    grid: Grid, begin: Array,
) -> None:  # fmt: skip
    """Work items of pages from `begin` on; `reach` is how long each row is when the call ends."""
    # A chunk is cut into tiles; a tile reads the pages up to its own last query.
    tiles = -(-counts // grid.tile_queries)
    which = np.repeat(np.arange(len(rows)), tiles)
    offset = (
        np.arange(len(which)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    ) * grid.tile_queries
    last = np.minimum(offset + grid.tile_queries, counts[which])
    first = (ends - counts)[which]
    single = counts[which] == 1
    length = np.where(single, reach[which], starts[which] + last)
    pages = -(-length // grid.page_size)
    index = (rows[which], pages, first + offset, first + last, begin[which])
    for chosen, room, count in (
        (single, plan.singles, plan.num_singles),
        (~single, plan.tiles, plan.num_tiles),
    ):
        row, page, query, end, from_page = (part[chosen] for part in index)
        items = cut_items(row, page, query, end, grid.split_pages, from_page)
        room[int(count) : int(count) + len(items)] = items
        count[...] += len(items)


def _fill_shared(
    plan: StepPlan[Array], rows: Array, starts: Array, counts: Array, tables: Array, grid: Grid,
    bucket: Bucket,
) -> Array:  # fmt: skip
    """Work items of pages that neighbours share; the pages from which each reads for itself."""
    # Pages that hold a row's own new tokens are not read whole by all of its queries.
    shared = shared_pages(
        tables[rows], starts // grid.page_size, counts, page_size=grid.page_size,
        tile=grid.tile_queries, least=grid.shared_pages, split=grid.split_pages,
        max_items=grid.room_for_shared(bucket), max_pairs=_SHARED_PER_QUERY * int(counts.sum()),
    )  # fmt: skip
    tiles = -(-(shared.end - shared.first) // grid.tile_queries)
    which = np.repeat(np.arange(len(tiles)), tiles)
    number = np.arange(len(which)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = shared.first[which] + number * grid.tile_queries
    items = cut_items(
        rows[shared.row[which]], shared.end_page[which], first,
        np.minimum(first + grid.tile_queries, shared.end[which]), grid.split_pages,
        shared.first_page[which],
    )  # fmt: skip
    plan.tiles[: len(items)] = items
    plan.num_tiles[...] = len(items)
    return shared.start
