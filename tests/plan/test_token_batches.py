"""The batch planner alone, with a stand-in for the device whose pages hold tokens."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages_of_tokens import VOCABULARY, Device, drive, requests_of_documents, rollout

from kvjax.cache import PageLedger
from kvjax.plan import Grid, Request, TokenBatches
from kvjax.plan.group_order import Turn, Work, deal_groups, group_work, order_turns
from kvjax.plan.prefix_groups import PrefixGroup, PrefixPlan, plan_prefixes

GRID = Grid(
    page_size=4, max_rows=3, pages_per_row=6, row_buckets=(1, 3), token_buckets=(8, 16),
    split_pages=2, tile_queries=4, decode_steps=3,
)  # fmt: skip
METHODS = ("naive", "lifting", "exact", "multi")


def planner_and_device(num_pages=32, grid=GRID, **options):
    return TokenBatches(grid, PageLedger(num_pages), **options), Device(grid, num_pages)


def test_a_group_runs_to_its_end_and_its_pages_return():
    """Two documents of 12 tokens, 4 questions each, asked in turns, 6 pages: one group at a time.

    Memory holds a document (3 pages) and three rows that go on from it; a first-come order would
    compute each document several times.
    """
    planner, device = planner_and_device(6, method="exact")
    documents = tuple(range(100, 112)), tuple(range(200, 212))
    for i in range(8):
        planner.add(Request(id=i, prompt=(*documents[i % 2], i), max_tokens=2))
    answers, _ = drive(planner, device)
    for i in range(8):
        assert answers[i] == (rollout((*documents[i % 2], i), 2), "length")
    assert planner.prefill_tokens_computed == 2 * 12 + 8
    assert planner.planned_savings == 2 * 3 * 12
    assert planner.ledger.held == 0 and planner.preemptions == 0


def test_levels_upon_levels():
    """A system prompt of 4 tokens, two documents of 8 after it: every level is computed once."""
    prompts = [(*range(4), *[50 + d] * 8, i) for i in range(3) for d in range(2)]
    computed = {}
    for method in METHODS:
        planner, device = planner_and_device(method=method)
        for i, prompt in enumerate(prompts):
            planner.add(Request(id=i, prompt=prompt, max_tokens=3))
        answers, _ = drive(planner, device)
        assert answers == {i: (rollout(p, 3), "length") for i, p in enumerate(prompts)}
        computed[method] = planner.prefill_tokens_computed
        assert computed[method] == 6 * 13 - planner.planned_savings
    assert computed == {
        "multi": 4 + 2 * 8 + 6, "exact": 2 * 12 + 6, "lifting": 2 * 12 + 6, "naive": 4 + 6 * 9,
    }  # fmt: skip


def test_prefix_pages_go_when_the_last_member_ends_and_not_before():
    planner, device = planner_and_device(method="exact")
    for i in range(5):
        planner.add(Request(id=i, prompt=(*range(100, 108), i), max_tokens=1 + 4 * i))
    done, held = set(), []
    while planner.busy:
        planned = planner.plan()
        for news in planner.accept(planned, device(planned)):
            done |= {news.id} if news.finish_reason else set()
        held.append((len(done), planner.ledger.held))
    assert all(pages >= 2 for ended, pages in held if ended < 5)
    assert held[-1] == (5, 0)


def test_much_to_draw_for_little_to_compute_goes_first():
    """A: 10 shared, 2 x (2 more, 3 to draw); B: 10 shared, 2 x (2, 30); and one alone (4, 1)."""
    plan = PrefixPlan(
        (PrefixGroup(10, -1, (0, 1)), PrefixGroup(10, -1, (2, 3))), alone=(4,), saved=20
    )
    work = [Work(12, 3), Work(12, 3), Work(12, 30), Work(12, 30), Work(4, 1)]
    groups, own = group_work(plan, work)
    assert groups == [Work(14, 6), Work(14, 60)]
    assert own == [Work(2, 3), Work(2, 3), Work(2, 30), Work(2, 30), Work(4, 1)]
    turns = order_turns(plan, work)
    assert turns[:3] == [Turn(True, 1), Turn(False, 3), Turn(False, 2)]
    assert turns[3] == Turn(True, 0) and turns[6] == Turn(False, 4)


def test_nested_groups_follow_their_parents():
    plan = PrefixPlan((PrefixGroup(4, -1, (0,)), PrefixGroup(8, 0, (1, 2))), alone=(), saved=0)
    work = [Work(6, 1), Work(9, 9), Work(9, 9)]
    assert group_work(plan, work)[0] == [Work(4 + 2 + 4 + 2, 19), Work(4 + 2, 18)]
    turns = order_turns(plan, work)
    assert turns[:2] == [Turn(True, 0), Turn(True, 1)] and turns[4] == Turn(False, 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 30)), max_size=20),
    st.integers(1, 5),
)
def test_groups_are_dealt_whole_and_evenly(specs, replicas):
    prompts = [(*[d] * 12, *[100 + i] * own) for i, (d, own, _) in enumerate(specs)]
    plan = plan_prefixes([prompt[:-1] for prompt in prompts], 4)
    work = [Work(len(p), draws) for p, (_, _, draws) in zip(prompts, specs, strict=True)]
    hands = deal_groups(plan, work, replicas)
    assert sorted(i for hand in hands for i in hand) == list(range(len(specs)))
    homes = [{d for d, _, _ in (specs[i] for i in hand)} for hand in hands]
    assert all(not a & b for i, a in enumerate(homes) for b in homes[:i])  # no document twice
    size = {d: 12 for d, _, _ in specs}
    for d, own, draws in specs:
        size[d] += own + draws
    loads = [sum(size[d] for d in home) for home in homes]
    assert max(loads) - min(loads) <= max(size.values(), default=0)


def test_documents_behind_a_beginning_common_to_all_are_dealt_evenly():
    prompts = [(*range(8), *[100 + d] * 12, i) for d in range(8) for i in range(3)]
    plan = plan_prefixes([prompt[:-1] for prompt in prompts], 4)
    assert [group.parent for group in plan.groups].count(-1) == 1  # one group holds them all
    hands = deal_groups(plan, [Work(len(prompt), 5) for prompt in prompts], 4)
    assert [len(hand) for hand in hands] == [6] * 4
    assert all(len({i // 3 for i in hand}) == 2 for hand in hands)  # whole documents


def test_requests_that_come_later_are_a_batch_of_their_own():
    planner, device = planner_and_device()
    for i in range(3):
        planner.add(Request(id=i, prompt=(*range(8), i), max_tokens=2))
    first = planner.plan()
    for i in range(3, 6):
        planner.add(Request(id=i, prompt=(*range(8), i), max_tokens=2))
    planner.accept(first, device(first))
    answers, _ = drive(planner, device)
    assert all(answers[i][0][-1] == rollout((*range(8), i), 2)[-1] for i in range(6))
    # The second batch finds the pages of the first; of a prompt's last page it computes all.
    assert planner.prefill_tokens_computed == 8 + 6 + 4


def test_what_cannot_be_planned_is_refused():
    planner, _ = planner_and_device(2)
    with pytest.raises(ValueError, match="9 tokens, a row holds 8"):
        planner.add(Request(id=0, prompt=tuple(range(9)), max_tokens=1))
    with pytest.raises(ValueError, match="below 0"):
        planner.add(Request(id=-1, prompt=(1,), max_tokens=1))
    assert not planner.busy and planner.plan() is None


def test_cancelled_requests_give_everything_back():
    for calls in range(5):
        planner, device = planner_and_device()
        for i in range(6):
            planner.add(Request(id=i, prompt=(*range(12), i), max_tokens=50))
        running = [planner.plan() for _ in range(calls)]
        planner.cancel(range(6))
        assert not planner.busy and planner.ledger.held == 0
        for planned in running:  # what they drew comes too late
            assert planned is None or planner.accept(planned, device(planned)) == []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    requests_of_documents(14), st.integers(6, 20), st.booleans(), st.booleans(), st.integers(0, 2),
    st.sets(st.integers(0, 13), max_size=5), st.sampled_from(METHODS), st.integers(0, 14),
)  # fmt: skip
def test_every_answer_is_its_own_whatever_the_memory(
    requests, num_pages, fixed, optimistic, ahead, gone, method, late
):
    """200 batches: no page is lost, shared wrongly or written by two, and none waits for ever."""
    grid = dataclasses.replace(GRID, fixed=fixed)
    planner, device = planner_and_device(num_pages, grid, optimistic=optimistic, method=method)
    todo = list(requests)
    for request in todo[: late or None]:
        planner.add(request)

    def interfere(calls):
        if calls == 2 and late:
            for request in todo[late:]:
                planner.add(request)
            todo[late:] = []
        if calls == 4:
            planner.cancel(gone)

    answers, _ = drive(planner, device, ahead, interfere)
    added = late if late and todo[late:] else len(requests)
    for i, request in enumerate(requests[:added]):
        prompt, stop = request.prompt, request.stop_ids
        expected = rollout(prompt, min(request.max_tokens, 24 - len(prompt) + 1), stop)
        if i not in gone:
            assert answers[i] == (expected, "stop" if expected[-1] in stop else "length")
        elif i in answers:
            assert answers[i][0] == expected[: len(answers[i][0])]
    if not (gone or late or optimistic):
        total = sum(len(request.prompt) for request in requests)
        assert planner.prefill_tokens_computed == total - planner.planned_savings
    assert planner.ledger.held == 0
    assert planner.ledger.available == num_pages


def test_what_is_expected_orders_a_batch():
    """By a request's own word, else by what those before it came to, else by the most there is."""
    planner, device = planner_and_device(grid=dataclasses.replace(GRID, max_rows=3))
    first = rollout((9,), 2)[-1]
    planner.add(Request(id=0, prompt=(9,), max_tokens=20, stop_ids=frozenset({first})))
    drive(planner, device)  # it ended after 1 or 2 tokens
    stop = frozenset({VOCABULARY + 1})
    planner.add(Request(id=1, prompt=(1, 1), max_tokens=9, stop_ids=stop))
    planner.add(Request(id=2, prompt=(2, 2), max_tokens=6))
    planner.add(Request(id=3, prompt=(3, 3), max_tokens=9, expected_tokens=4))
    planned = planner.plan()
    assert [seat.request.id for seat in planned.seats] == [2, 3, 1]
