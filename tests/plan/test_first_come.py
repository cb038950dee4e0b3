"""The first-come planner alone, with a stand-in for the device that draws fixed tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import PageLedger
from kvjax.plan import FirstCome, Grid, Request

GRID = Grid(
    page_size=4, max_rows=3, pages_per_row=6, row_buckets=(1, 3), token_buckets=(8, 16),
    split_pages=2, tile_queries=4,
)  # fmt: skip


def drive(planner, token=lambda step: 7):
    """Runs the planner dry; returns each request's tokens and the number of steps."""
    answers, steps = {}, 0
    while planner.busy:
        planned = planner.plan()
        drawn = [token(steps)] * int((planned.step.sample_row < planner.grid.max_rows).sum())
        for sampled in planner.accept(drawn):
            tokens, _ = answers.setdefault(sampled.id, ([], None))
            tokens.append(sampled.token)
            answers[sampled.id] = (tokens, sampled.finish_reason)
        ledger = planner.ledger
        assert ledger.held <= ledger.num_pages
        steps += 1
        assert steps < 1000
    return answers, steps


def test_a_shared_prefix_is_computed_once():
    """Five prompts over one document of 12 tokens: the document once, each question by itself."""
    planner = FirstCome(GRID, PageLedger(32))
    document = tuple(range(100, 112))
    for i in range(5):
        planner.add(Request(id=i, prompt=(*document, i, 50, 51), max_tokens=2))
    answers, _ = drive(planner)
    assert planner.prefill_tokens_computed == 12 + 5 * 3
    assert {i: a for i, (a, _) in answers.items()} == {i: [7, 7] for i in range(5)}
    assert planner.ledger.held == 0


def test_a_page_with_a_twin_is_not_written_again():
    """Two equal prompts of 6 tokens, pages of 4: whoever fills tokens 4 to 7 second takes the
    first one's page, and the token that filled it is not written."""
    planner = FirstCome(GRID, PageLedger(32))
    for i in range(2):
        planner.add(Request(id=i, prompt=(1, 2, 3, 4, 5, 6), max_tokens=6))
    unwritten = []
    while planner.busy:
        step = planner.plan().step
        live = step.row < GRID.max_rows
        unwritten += [(int(p)) for p in step.position[live & ~step.write]]
        planner.accept([7] * int((step.sample_row < GRID.max_rows).sum()))
    # Token 7 fills the second page; 11 would fill the third, but the last token is not stored.
    assert unwritten == [7]


def test_stop_tokens_and_lengths():
    planner = FirstCome(GRID, PageLedger(32))
    planner.add(Request(id=0, prompt=(1,), max_tokens=9, stop_ids=frozenset({7})))
    planner.add(Request(id=1, prompt=(1, 2), max_tokens=3))
    planner.add(Request(id=2, prompt=(1, 2, 3), max_tokens=10_000))
    answers, _ = drive(planner)
    assert answers[0] == ([7], "stop")
    assert answers[1] == ([7] * 3, "length")
    # The row holds 24 tokens; the last one drawn needs no place.
    assert answers[2] == ([7] * (24 - 3 + 1), "length")


def test_what_never_fits_is_refused_at_once():
    planner = FirstCome(GRID, PageLedger(2))
    with pytest.raises(ValueError, match="9 tokens, a row holds 8"):
        planner.add(Request(id=0, prompt=tuple(range(9)), max_tokens=1))
    with pytest.raises(ValueError, match="no tokens"):
        planner.add(Request(id=0, prompt=(), max_tokens=1))
    planner.add(Request(id=0, prompt=tuple(range(8)), max_tokens=5))
    answers, _ = drive(planner)
    assert answers[0] == ([7], "length")


def test_cancelled_requests_give_everything_back():
    planner = FirstCome(GRID, PageLedger(32))
    for i in range(6):
        planner.add(Request(id=i, prompt=tuple(range(10 + i)), max_tokens=50))
    for _ in range(4):
        drawn = int((planner.plan().step.sample_row < 3).sum())
        planner.accept([7] * drawn)
    planner.cancel(range(6))
    assert not planner.busy and planner.ledger.held == 0


requests = st.lists(
    st.tuples(
        st.integers(0, 2),  # which document
        st.integers(0, 14),  # how much of it
        st.lists(st.integers(0, 3), min_size=1, max_size=6),  # the question
        st.integers(1, 12),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(requests, st.integers(6, 20))
def test_every_request_ends_whatever_the_memory(specs, num_pages):
    """Safe admission: the ledger never runs out, nothing waits for ever, no page is left."""
    planner = FirstCome(GRID, PageLedger(num_pages))
    for i, (document, part, question, max_tokens) in enumerate(specs):
        prompt = (*range(100 * document, 100 * document + part), *question)
        planner.add(Request(id=i, prompt=prompt, max_tokens=max_tokens))
    answers, _ = drive(planner, token=lambda step: step % 5)
    for i, (_, part, question, max_tokens) in enumerate(specs):
        tokens, reason = answers[i]
        room = 24 - part - len(question) + 1
        assert (len(tokens), reason) == (min(max_tokens, room), "length")
    assert planner.ledger.held == 0
    assert planner.ledger.available == num_pages
