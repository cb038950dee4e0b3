"""What a planner hands to the engine's step: arrays of a few declared shapes.

Letters: T tokens of a step, B sampled rows, I work items, P tokens a page, M pages a row may hold.
"""

import dataclasses
from typing import Generic, NamedTuple, TypeVar

import numpy as np

__all__ = ["Bucket", "Grid", "Run", "StepPlan", "cut_items", "pack"]

Array = np.ndarray
# A plan's arrays are numpy's where it is made, and JAX's inside of the step.
A = TypeVar("A")


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """One compiled shape: T tokens, B sampled rows, and whether a row may bring a chunk."""

    tokens: int
    rows: int
    chunks: bool


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
    """

    page_size: int = 16
    max_rows: int = 64
    pages_per_row: int = 64
    row_buckets: tuple[int, ...] = (8, 64)
    token_buckets: tuple[int, ...] = (64, 512)
    split_pages: int = 16
    tile_queries: int = 32

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
    def buckets(self) -> tuple[Bucket, ...]:
        """Every shape that a step can have."""
        decode = [Bucket(rows, rows, False) for rows in self.row_buckets]
        return (*decode, *(Bucket(t, min(t, self.max_rows), True) for t in self.token_buckets))

    def bucket(self, tokens: int, chunks: bool) -> Bucket:
        """The smallest shape that holds `tokens`."""
        return min(b for b in self.buckets if b.tokens >= tokens and b.chunks == chunks)

    def room_for_items(self, bucket: Bucket) -> tuple[int, int]:
        """The most work items (of single queries, of chunk tiles) that a step may need."""
        splits = -(-self.pages_per_row // self.split_pages)
        if not bucket.chunks:
            return bucket.rows * splits, 0
        tiles = bucket.tokens // self.tile_queries + min(bucket.tokens // 2, self.max_rows)
        return bucket.rows * splits, tiles * splits


class StepPlan(NamedTuple, Generic[A]):
    """One step as data. Unused places hold what the device drops.

    Attributes:
        token: int32[T], -1: the token that the row sampled last, which is on the device.
        position: int32[T] true positions.
        row: int32[T] seat of each token; `max_rows` where there is none.
        write: bool[T], whether its key and value are written: not if they are there already.
        grow: int32[3, T]: row, entry, page: the table's new entries, made before anything else.
        singles: int32[I, 5] work items of rows that bring one token.
        num_singles: int32 scalar.
        tiles: int32[I', 5] work items of rows that bring a chunk.
        num_tiles: int32 scalar.
        sample: int32[B], the place among the T tokens whose successor is drawn.
        sample_row: int32[B], `max_rows` where there is none.
        temperature: float32[B], 0: the likeliest token.
        top_p: float32[B].
        seed: uint32[B].
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
    temperature: A
    top_p: A
    seed: A

    @staticmethod
    def empty(grid: Grid, bucket: Bucket) -> "StepPlan[Array]":
        """A step that does nothing; also the shapes and dtypes to compile for."""
        tokens, rows = bucket.tokens, bucket.rows
        singles, tiles = grid.room_for_items(bucket)
        nobody = np.full(tokens, grid.max_rows, np.int32)
        return StepPlan(
            token=np.zeros(tokens, np.int32),
            position=np.zeros(tokens, np.int32),
            row=nobody,
            write=np.zeros(tokens, np.bool_),
            grow=np.stack([nobody, np.zeros_like(nobody), np.zeros_like(nobody)]),
            singles=np.zeros((singles, 5), np.int32),
            num_singles=np.zeros((), np.int32),
            tiles=np.zeros((tiles, 5), np.int32),
            num_tiles=np.zeros((), np.int32),
            sample=np.zeros(rows, np.int32),
            sample_row=np.full(rows, grid.max_rows, np.int32),
            temperature=np.zeros(rows, np.float32),
            top_p=np.ones(rows, np.float32),
            seed=np.zeros(rows, np.uint32),
        )


class Run(NamedTuple):
    """What one row brings to a step.

    Attributes:
        row: its seat.
        start: the true position of the first token.
        tokens: the tokens, or [-1] for the one that it sampled last.
        stored: how many of them, from the first on, are in shared pages already.
        pages: all pages of the row once the tokens are in.
        draws: (temperature, top_p, seed) if the successor of the last token is drawn, else None.
    """

    row: int
    start: int
    tokens: list[int]
    stored: int
    pages: list[int]
    draws: tuple[float, float, int] | None


def cut_items(rows: Array, pages: Array, first: Array, end: Array, split: int) -> Array:
    """Cuts (row, page count, query run) into work items of at most `split` pages.

    Args:
        rows: int[n].
        pages: int[n], how many each reads.
        first: int[n], its first query.
        end: int[n], the query after its last.
        split: pages an item; cuts lie at its multiples, whatever else is in the batch.

    Returns:
        int32[I, 5], see `kvjax.pallas_kernels.page_attention.Items`.
    """
    splits = -(-pages // split)
    which = np.repeat(np.arange(len(rows)), splits)
    number = np.arange(len(which)) - np.repeat(np.cumsum(splits) - splits, splits)
    first_page = number * split
    end_page = np.minimum(first_page + split, pages[which])
    return np.stack(
        [rows[which], first_page, end_page, first[which], end[which]], 1, dtype=np.int32
    )


def pack(runs: list[Run], grid: Grid) -> tuple[Bucket, StepPlan[Array]]:
    """Lays runs out in the smallest bucket that holds them, in the order given."""
    counts = np.array([len(run.tokens) for run in runs])
    bucket = grid.bucket(int(counts.sum()), chunks=bool(counts.max() > 1))
    plan = StepPlan.empty(grid, bucket)
    ends = np.cumsum(counts)
    drawn = 0
    for run, end in zip(runs, ends.tolist(), strict=True):
        n = len(run.tokens)
        place = slice(end - n, end)
        plan.token[place] = run.tokens
        plan.position[place] = np.arange(run.start, run.start + n)
        plan.row[place] = run.row
        plan.write[place.start + run.stored : end] = True
        # The pages from the one that the first token falls in may be new; never more than n.
        entries = range(run.start // grid.page_size, len(run.pages))
        grow = slice(end - n, end - n + len(entries))
        plan.grow[0, grow], plan.grow[1, grow] = run.row, entries
        plan.grow[2, grow] = run.pages[entries.start :]
        if run.draws is not None:
            plan.sample[drawn], plan.sample_row[drawn] = end - 1, run.row
            plan.temperature[drawn], plan.top_p[drawn], plan.seed[drawn] = run.draws
            drawn += 1
    _fill_items(plan, runs, counts, ends, grid)
    return bucket, plan


def _fill_items(
    plan: StepPlan[Array], runs: list[Run], counts: Array, ends: Array, grid: Grid
) -> None:
    rows = np.array([run.row for run in runs])
    starts = np.array([run.start for run in runs])
    # A chunk is cut into tiles; a tile reads the pages up to its own last query.
    tiles = -(-counts // grid.tile_queries)
    which = np.repeat(np.arange(len(runs)), tiles)
    offset = (
        np.arange(len(which)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    ) * grid.tile_queries
    last = np.minimum(offset + grid.tile_queries, counts[which])
    first = (ends - counts)[which]
    pages = -(-(starts[which] + last) // grid.page_size)
    index = (rows[which], pages, first + offset, first + last)
    single = counts[which] == 1
    for chosen, room, count in (
        (single, plan.singles, plan.num_singles),
        (~single, plan.tiles, plan.num_tiles),
    ):
        row, page, begin, end = (part[chosen] for part in index)
        items = cut_items(row, page, begin, end, grid.split_pages)
        room[: len(items)] = items
        count[...] = len(items)
