"""Packing runs into a step: literal cases, and that every key is read once by whom it should."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.plan import Bucket, Grid
from kvjax.plan.step import Run, cut_items, pack

GRID = Grid(
    page_size=4, max_rows=4, pages_per_row=8, row_buckets=(2, 4), token_buckets=(8, 16),
    split_pages=2, tile_queries=3,
)  # fmt: skip


def test_the_smallest_bucket_is_taken_and_the_budget_is_never_passed():
    assert GRID.bucket(2, chunks=False) == Bucket(2, 2, False, steps=8)
    assert GRID.bucket(3, chunks=False) == Bucket(4, 4, False, steps=8)
    assert GRID.bucket(3, chunks=True) == Bucket(8, 4, True)
    assert GRID.bucket(9, chunks=True) == Bucket(16, 4, True)
    with pytest.raises(ValueError, match="row_buckets"):
        Grid(max_rows=4, row_buckets=(4, 2), token_buckets=(8,))
    with pytest.raises(ValueError, match="token_buckets"):
        Grid(max_rows=4, row_buckets=(4,), token_buckets=(2,))


def test_a_fixed_grid_has_a_shape_for_everything_that_depends_on_data():
    grid = dataclasses.replace(GRID, fixed=True)
    assert len(grid.buckets) == len(set(grid.buckets)) == 2 * 2 * 2 + 2 * 2
    assert grid.bucket(2, False, steps=8, asks=True) == Bucket(2, 2, False, 8, True)
    assert grid.bucket(2, False) == Bucket(2, 2, False, 1, False)
    assert grid.bucket(5, True, asks=True) == Bucket(8, 4, True, 1, True)
    assert [grid.steps(most) for most in (1, 4, 5, 100)] == [1, 1, 8, 8]
    assert [GRID.steps(most) for most in (0, 1, 4, 100)] == [1, 1, 4, 8]


def test_rows_are_cut_at_fixed_multiples():
    index = cut_items(np.array([7, 5]), np.array([5, 1]), np.array([0, 1]), np.array([1, 2]), 2)
    np.testing.assert_array_equal(
        index, [[7, 0, 2, 0, 1], [7, 2, 4, 0, 1], [7, 4, 5, 0, 1], [5, 0, 1, 1, 2]]
    )


def test_a_decoding_row_and_a_chunk():
    """Row 2 brings its 6th token; row 0 brings tokens 3 to 6 of its prompt and draws nothing."""
    runs = [
        Run(row=2, start=5, tokens=[-1], stored=0, pages=[9, 4], draws=1, targets=[]),
        Run(row=0, start=3, tokens=[11, 12, 13, 14], stored=1, pages=[6, 1], draws=0, targets=[]),
    ]
    bucket, plan = pack(runs, GRID)
    assert bucket == Bucket(8, 4, True)
    np.testing.assert_array_equal(plan.token[:5], [-1, 11, 12, 13, 14])
    np.testing.assert_array_equal(plan.position[:5], [5, 3, 4, 5, 6])
    np.testing.assert_array_equal(plan.row, [2, 0, 0, 0, 0, 4, 4, 4])
    np.testing.assert_array_equal(plan.write, [True, False, True, True, True, False, False, False])
    # Token 5 of row 2 is in its entry 1; tokens 3 to 6 of row 0 in entries 0 and 1.
    np.testing.assert_array_equal(plan.grow[:, :3], [[2, 0, 0], [1, 0, 1], [4, 6, 1]])
    np.testing.assert_array_equal(plan.grow[0, 3:], [4] * 5)
    assert (plan.num_singles, plan.num_tiles) == (1, 2)
    np.testing.assert_array_equal(plan.singles[0], [2, 0, 2, 0, 1])
    np.testing.assert_array_equal(plan.tiles[:2], [[0, 0, 2, 1, 4], [0, 0, 2, 4, 5]])
    np.testing.assert_array_equal(plan.sample, [0, 0, 0, 0])
    np.testing.assert_array_equal(plan.sample_row, [2, 4, 4, 4])
    np.testing.assert_array_equal(plan.room, [1, 0, 0, 0])
    assert plan.steps == 1 and plan.target.max() == -1


def test_steps_that_follow_each_other():
    """Rows of 6 and 3 tokens may draw 4 and 2: items and entries reach as far as they will."""
    runs = [
        Run(row=2, start=5, tokens=[-1], stored=0, pages=[9, 4, 7], draws=4, targets=[]),
        Run(row=1, start=2, tokens=[-1], stored=0, pages=[6], draws=2, targets=[]),
    ]
    bucket, plan = pack(runs, GRID, steps=4)
    assert bucket == Bucket(2, 2, False, steps=8) and plan.steps == 4
    np.testing.assert_array_equal(plan.room, [4, 2])
    np.testing.assert_array_equal(plan.grow[:, :3], [[2, 2, 1], [1, 2, 0], [4, 7, 6]])
    # Positions 5 to 8 lie in three pages, of which an item spans two; positions 2 and 3 in one.
    np.testing.assert_array_equal(
        plan.singles[: int(plan.num_singles)], [[2, 0, 2, 0, 1], [2, 2, 3, 0, 1], [1, 0, 1, 1, 2]]
    )


def test_targets_stand_beside_the_tokens_before_them():
    runs = [
        Run(row=0, start=8, tokens=[-1], stored=0, pages=[1, 2, 3], draws=1, targets=[]),
        Run(row=1, start=0, tokens=[5, 6, 7], stored=0, pages=[4], draws=0, targets=[-1, 7, 8]),
    ]
    bucket, plan = pack(runs, GRID)
    assert bucket.chunks
    np.testing.assert_array_equal(plan.target, [-1, -1, 7, 8, -1, -1, -1, -1])


@st.composite
def steps(draw):
    """Rows with some tokens before and some new ones, within a step's budget."""
    budget, runs = GRID.token_buckets[-1], []
    for row in draw(st.permutations(range(GRID.max_rows))):
        start = draw(st.integers(0, 31))
        n = draw(st.integers(0, min(budget, 32 - start)))
        if n:
            pages = [100 * row + i for i in range(-(-(start + n) // 4))]
            runs.append(Run(row, start, [1] * n, 0, pages, 0, []))
            budget -= n
    return runs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps().filter(bool))
def test_every_query_reads_its_row_up_to_itself_exactly_once(runs):
    _, plan = pack(runs, GRID)
    reads = np.zeros((len(plan.token), GRID.max_rows, 32), int)
    for items, count in ((plan.singles, plan.num_singles), (plan.tiles, plan.num_tiles)):
        for row, first_page, end_page, first, end in items[: int(count)]:
            assert end_page - first_page <= GRID.split_pages
            assert first_page % GRID.split_pages == 0
            reads[first:end, row, first_page * 4 : end_page * 4] += 1
    for t, (row, position) in enumerate(zip(plan.row, plan.position, strict=True)):
        if row < GRID.max_rows:
            assert np.all(reads[t, row, : position + 1] == 1)
            assert reads[t].sum() == reads[t, row].sum()
        else:
            assert reads[t].sum() == 0
    for run in runs:
        mine = plan.grow[0] == run.row
        entries = dict(zip(plan.grow[1][mine].tolist(), plan.grow[2][mine].tolist(), strict=True))
        assert entries == {i: run.pages[i] for i in range(run.start // 4, len(run.pages))}
