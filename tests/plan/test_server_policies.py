"""Servers' policies: what they are said to do, and that everybody gets the answer."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages_of_tokens import Device, drive, requests_of_documents, rollout

from kvjax.cache import PageLedger
from kvjax.plan import DualScan, Grid, PrefillFirst, Request, SortedCome

GRID = Grid(
    page_size=4, max_rows=3, pages_per_row=8, row_buckets=(1, 3), token_buckets=(8, 16),
    split_pages=2, tile_queries=4, decode_steps=3,
)  # fmt: skip
ROOMY = dataclasses.replace(GRID, max_rows=16, row_buckets=(16,), token_buckets=(16, 64))


@settings(max_examples=30, deadline=None)
@given(requests_of_documents(8), st.integers(8, 24), st.integers(0, 2))
@pytest.mark.parametrize("kind", [PrefillFirst, DualScan, SortedCome])
def test_everybody_is_answered_and_no_page_is_lost(kind, requests, num_pages, ahead):
    planner, device = kind(GRID, PageLedger(num_pages)), Device(GRID, num_pages)
    for request in requests:
        planner.add(request)
    answers, _ = drive(planner, device, ahead=ahead)
    for request in requests:
        drawn = rollout(request.prompt, request.max_tokens, request.stop_ids)
        assert answers[request.id][0] == drawn
    assert planner.ledger.held == 0


def test_nobody_decodes_while_there_are_prompts():
    planner = PrefillFirst(ROOMY, PageLedger(200))
    for i in range(12):
        planner.add(Request(id=i, prompt=tuple(range(i, i + 10)), max_tokens=6))
    kinds = []
    while planner.busy:
        planned = planner.plan()
        kinds.append({"prompt" if len(e.row.tokens) == 10 else "answer" for e in planned.entries})
        steps, rows = planned.bucket.steps, planned.bucket.rows
        planner.accept(planned, _ones(steps, rows))
    assert all(len(kind) == 1 for kind in kinds)
    assert [kind == {"prompt"} for kind in kinds] == sorted(
        (kind == {"prompt"} for kind in kinds), reverse=True
    )


def _ones(steps, rows):
    return np.ones((steps, rows), np.int32)


def test_the_longest_beginning_in_the_cache_is_next():
    planner = PrefillFirst(ROOMY, PageLedger(200))
    planner.add(Request(id=0, prompt=tuple(range(50, 62)), max_tokens=1))
    first = planner.plan()
    planner.accept(first, _ones(first.bucket.steps, first.bucket.rows))
    planner.add(Request(id=1, prompt=(9, 9, 9, 9, 9), max_tokens=1))
    planner.add(Request(id=2, prompt=(*range(50, 62), 7), max_tokens=1))
    assert [seat.request.id for seat in planner.plan().seats] == [2, 1]


def test_out_of_memory_those_who_drew_least_wait_again():
    """Room for two at their ends and a third at its start: the last to begin is thrown out."""
    grid = dataclasses.replace(ROOMY, decode_steps=1)
    planner, device = PrefillFirst(grid, PageLedger(13)), Device(grid, 13)
    planner.first_part = planner._part = 0.0
    for i in range(3):
        planner.add(Request(id=i, prompt=(10 + i, *range(7)), max_tokens=14))
    answers, _ = drive(planner, device, ahead=0)
    assert planner.preemptions > 0 and planner._part > 0
    for i in range(3):
        assert answers[i][0] == rollout((10 + i, *range(7)), 14)


def test_both_ends_are_taken_in_turns_and_documents_stay_together():
    """Two documents asked for long answers, two for short: one of each kind runs at a time."""
    planner = DualScan(ROOMY, PageLedger(400))
    draws = {0: 2, 1: 30, 2: 2, 3: 30}
    for i in range(16):
        document = tuple(range(100 * (i % 4), 100 * (i % 4) + 12))
        planner.add(Request(id=i, prompt=(*document, 90 + i), max_tokens=draws[i % 4]))
    order = [row.request.id % 4 for row in planner._order(list(planner._waiting))]
    for document in range(4):
        places = [place for place, d in enumerate(order) if d == document]
        kind = [d for d in order if draws[d] == draws[document]]
        assert kind.index(document) in (0, 4), "documents of a kind follow each other"
        assert len(places) == 4
    half = order[:8]
    assert {draws[d] for d in half} == {2, 30}
