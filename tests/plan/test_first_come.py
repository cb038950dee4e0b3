"""The first-come planner alone, with a stand-in for the device whose pages hold tokens."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages_of_tokens import Device, drive, requests_of_documents, rollout

from kvjax.cache import PageLedger
from kvjax.plan import FirstCome, Grid, Request

GRID = Grid(
    page_size=4, max_rows=3, pages_per_row=6, row_buckets=(1, 3), token_buckets=(8, 16),
    split_pages=2, tile_queries=4, decode_steps=3,
)  # fmt: skip


def planner_and_device(num_pages=32, grid=GRID, **options):
    return FirstCome(grid, PageLedger(num_pages), **options), Device(grid, num_pages)


def test_a_shared_prefix_is_computed_once():
    """Five prompts over one document of 12 tokens: the document once, each question by itself."""
    planner, device = planner_and_device()
    document = tuple(range(100, 112))
    for i in range(5):
        planner.add(Request(id=i, prompt=(*document, i, 50, 51), max_tokens=2))
    answers, _ = drive(planner, device)
    assert planner.prefill_tokens_computed == 12 + 5 * 3
    for i in range(5):
        assert answers[i] == (rollout((*document, i, 50, 51), 2), "length")
    assert planner.ledger.held == 0


def test_a_page_with_a_twin_is_not_written_again():
    """Two equal prompts of 8 tokens, planned together: the second one's pages are the first's."""
    planner, device = planner_and_device()
    for i in range(2):
        planner.add(Request(id=i, prompt=(1, 2, 3, 4, 5, 6, 7, 8), max_tokens=6))
    unwritten = []

    def watch(planned):
        live = planned.step.row < GRID.max_rows
        unwritten.extend(int(p) for p in planned.step.position[live & ~planned.step.write])
        return device(planned)

    drive(planner, watch)
    # The second finds tokens 0 to 3; the page of tokens 4 to 7 turns out to have a twin.
    assert unwritten == [4, 5, 6, 7]


def test_stop_tokens_and_lengths():
    planner, device = planner_and_device()
    (first,) = rollout((1,), 1)
    planner.add(Request(id=0, prompt=(1,), max_tokens=9, stop_ids=frozenset({first})))
    planner.add(Request(id=1, prompt=(1, 2), max_tokens=3))
    planner.add(Request(id=2, prompt=(1, 2, 3), max_tokens=10_000))
    answers, _ = drive(planner, device)
    assert answers[0] == ([first], "stop")
    assert answers[1] == (rollout((1, 2), 3), "length")
    # The row holds 24 tokens; the last one drawn needs no place.
    assert answers[2] == (rollout((1, 2, 3), 24 - 3 + 1), "length")


def test_decoding_rows_run_several_steps_a_call():
    """12 tokens of one row: one with the prompt, the others by threes."""
    planner, device = planner_and_device()
    planner.add(Request(id=0, prompt=(1, 2), max_tokens=13))
    answers, calls = drive(planner, device)
    assert answers[0] == (rollout((1, 2), 13), "length") and calls == 1 + 12 // 3


def test_what_never_fits_is_refused_at_once():
    planner, device = planner_and_device(2)
    with pytest.raises(ValueError, match="9 tokens, a row holds 8"):
        planner.add(Request(id=0, prompt=tuple(range(9)), max_tokens=1))
    with pytest.raises(ValueError, match="no tokens"):
        planner.add(Request(id=0, prompt=(), max_tokens=1))
    planner.add(Request(id=0, prompt=tuple(range(8)), max_tokens=5))
    answers, _ = drive(planner, device)
    assert answers[0] == (rollout(range(8), 1), "length")


def test_a_prompt_is_scored_once_whoever_knows_its_pages():
    """Tokens 5 to 9 of a prompt whose pages are all known: as few as can be are computed again."""
    planner, device = planner_and_device()
    prompt = tuple(range(20, 30))
    planner.add(Request(id=0, prompt=prompt, max_tokens=1))
    drive(planner, device)
    before = planner.prefill_tokens_computed
    planner.add(Request(id=1, prompt=prompt, max_tokens=0, score_from=5))
    answers, _ = drive(planner, device)
    assert answers[1] == ([], "length")
    assert device.scored == {prompt[: i + 1] for i in range(5, 10)}
    assert planner.prefill_tokens_computed - before == 10 - 4
    assert planner.ledger.held == 0


def test_cancelled_requests_give_everything_back():
    planner, device = planner_and_device()
    for i in range(6):
        planner.add(Request(id=i, prompt=tuple(range(10 + i)), max_tokens=50))
    running = [planner.plan() for _ in range(4)]
    planner.cancel(range(6))
    assert not planner.busy and planner.ledger.held == 0
    for planned in running:  # what they drew comes too late
        assert planner.accept(planned, device(planned)) == []


def test_the_youngest_make_room_and_lose_nothing():
    """Three rows of up to 6 pages in a pool of 8: they begin together all the same."""
    planner, device = planner_and_device(8, optimistic=True)
    for i in range(3):
        planner.add(Request(id=i, prompt=(i, i, i), max_tokens=20))
    answers, _ = drive(planner, device)
    for i in range(3):
        assert answers[i] == (rollout((i, i, i), 20), "length")
    assert planner.preemptions > 0 and planner.ledger.held == 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    requests_of_documents(12), st.integers(6, 20), st.booleans(), st.booleans(), st.integers(0, 2),
    st.sets(st.integers(0, 11)),
)  # fmt: skip
def test_every_answer_is_its_own_whatever_the_memory(
    requests, num_pages, fixed, optimistic, ahead, gone
):
    """No page is lost, shared wrongly or written by two; nothing waits for ever; answers do not
    depend on memory, company, chunks, preemption, or how far the host plans ahead."""
    grid = dataclasses.replace(GRID, fixed=fixed)
    planner, device = planner_and_device(num_pages, grid, optimistic=optimistic)
    for request in requests:
        planner.add(request)

    def cancel(calls):
        if calls == 4:
            planner.cancel(gone)

    answers, _ = drive(planner, device, ahead, cancel)
    for i, request in enumerate(requests):
        prompt, stop, score = request.prompt, request.stop_ids, request.score_from
        expected = rollout(prompt, min(request.max_tokens, 24 - len(prompt) + 1), stop)
        if i not in gone:
            reason = "stop" if expected[-1] in stop else "length"
            assert answers[i] == (expected, reason)
            for place in range(score, len(prompt)) if score else ():
                assert prompt[: place + 1] in device.scored
        elif i in answers:
            assert answers[i][0] == expected[: len(answers[i][0])]
    assert planner.ledger.held == 0
    assert planner.ledger.available == num_pages
