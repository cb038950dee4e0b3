"""Pages that rows share are read once for all of them, and every query still reads its row."""

import dataclasses
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.plan import Grid
from kvjax.plan.sharing import order_sharers, shared_pages
from kvjax.plan.step import Run, cut_items, pack

GRID = Grid(
    page_size=4, max_rows=6, pages_per_row=8, row_buckets=(2, 6), token_buckets=(8, 24),
    split_pages=2, tile_queries=3, shared_pages=1,
)  # fmt: skip
SIZES = {"page_size": 16, "tile": 4, "least": 2, "split": 8, "max_items": 99, "max_pairs": 999}


def test_sharers_become_neighbours():
    pages = np.array([[5, 1, 9], [2, 3, 300], [5, 1, 8], [2, 4, 1], [2, 3, 7]])
    assert order_sharers(pages).tolist() == [4, 1, 3, 2, 0]


def test_levels_of_sharing():
    """Four rows share 2 pages, the first two of them 3 more: two runs, one upon the other."""
    pages = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 8, 9, 10, 11],
                      [1, 2, 12, 13, 14, 15]])  # fmt: skip
    depth, counts = np.full(4, 6), np.ones(4, int)
    found = shared_pages(pages, depth, counts, **SIZES)
    assert list(zip(*(column.tolist() for column in found[:5]), strict=True)) == [
        (0, 0, 2, 0, 4),
        (0, 2, 5, 0, 2),
    ]
    assert found.start.tolist() == [5, 5, 2, 2]
    # With room for one item only the first run is read together; without room none is.
    assert shared_pages(pages, depth, counts, **SIZES | {"max_items": 1}).start.tolist() == [2] * 4
    assert shared_pages(pages, depth, counts, **SIZES | {"max_pairs": 3}).start.tolist() == [
        5, 5, 0, 0,
    ]  # fmt: skip


def test_what_does_not_pay_is_left_alone():
    pages = np.array([[1, 2, 3], [1, 2, 4], [5, 6, 7]])
    some = np.ones(3, int)
    assert shared_pages(pages, np.full(3, 3), some, **SIZES).start.tolist() == [2, 2, 0]
    # Pages that a row's new tokens fall in are its own: here from the second page on.
    assert shared_pages(pages, np.array([3, 1, 3]), some, **SIZES).start.tolist() == [0] * 3
    # Chunks of 40 queries read their pages ten times anyway, but would be merged 80 times.
    chunks = np.array([40, 40, 40])
    assert shared_pages(pages, np.full(3, 3), chunks, **SIZES).start.tolist() == [0] * 3


def test_cuts_lie_at_multiples_wherever_a_row_begins_to_read():
    index = cut_items(*np.array([[7], [5], [0], [1]]), 2, np.array([1]))
    np.testing.assert_array_equal(index, [[7, 1, 2, 0, 1], [7, 2, 4, 0, 1], [7, 4, 5, 0, 1]])


@st.composite
def steps(draw):
    """Rows of a few beginnings, their tables, and what each brings to a step."""
    rows = draw(st.permutations(range(GRID.max_rows)))
    budget, runs = GRID.token_buckets[-1], []
    tables = np.zeros((GRID.max_rows, GRID.pages_per_row), np.int32)
    for n, row in enumerate(rows):
        tables[row] = 100 * row + np.arange(GRID.pages_per_row)
        if n and draw(st.booleans()):
            of = draw(st.sampled_from(rows[:n]))
            length = draw(st.integers(1, GRID.pages_per_row))
            tables[row, :length] = tables[of, :length]
        start = draw(st.integers(0, 31))
        count = draw(st.sampled_from([0, 1, 1, 1, 2, 5]))
        count = min(count, budget, 32 - start)
        if count:
            pages = tables[row, : -(-(start + count) // 4)].tolist()
            runs.append(Run(row, start, [1] * count, 0, pages, 0, []))
            budget -= count
    return runs, tables


@settings(max_examples=150, deadline=None, derandomize=True)
@given(steps().filter(lambda step: bool(step[0])))
def test_every_query_reads_its_rows_pages_exactly_once(step):
    runs, tables = step
    order = order_sharers(tables[[run.row for run in runs]])
    runs = [runs[i] for i in order]
    bucket, plan = pack(runs, GRID, tables=tables)
    reads = [[] for _ in range(bucket.tokens)]
    pairs = 0
    for items, count in ((plan.singles, plan.num_singles), (plan.tiles, plan.num_tiles)):
        assert count <= len(items)
        for row, first_page, end_page, first, end in items[: int(count)]:
            assert 0 < end_page - first_page <= GRID.split_pages
            assert 0 < end - first <= (1 if items is plan.singles else GRID.tile_queries)
            pairs += end - first
            for query in range(first, end):
                reads[query] += tables[row, first_page:end_page].tolist()
    assert pairs <= GRID.room_for_partials(bucket.tokens)
    for query, (row, position) in enumerate(zip(plan.row, plan.position, strict=True)):
        if row < GRID.max_rows:
            own = tables[row].tolist()
            # Its tile may read a page or more beyond its own position, which causality hides.
            assert sorted(reads[query]) == sorted(own[: len(reads[query])])
            assert len(reads[query]) >= position // 4 + 1
        else:
            assert reads[query] == []


def test_256_rows_take_little_time():
    """16 rows on each of 16 prefixes of 125 pages: 256 rows, well under a step."""
    grid = dataclasses.replace(
        GRID, page_size=16, max_rows=256, pages_per_row=144, row_buckets=(256,),
        token_buckets=(256,), split_pages=64, tile_queries=32, shared_pages=4,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tables = rng.permutation(256 * 144).reshape(256, 144).astype(np.int32)
    tables[:, :125] = tables[rng.permutation(np.repeat(np.arange(16), 16)), :125]
    depth, counts = np.full(256, 126), np.ones(256, int)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        order = order_sharers(tables)
        found = shared_pages(
            tables[order], depth, counts, page_size=16, tile=32, least=4, split=64,
            max_items=grid.room_for_shared(grid.buckets[0]), max_pairs=512,
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
    assert len(found.row) == 16 and np.all(found.end_page == 125)
    assert min(seconds) < 1e-3
