"""Every way to plan a batch gives the answers that each request gets by itself."""

import dataclasses

import jax.numpy as jnp
import models_for_tests
import numpy as np
import pytest

from kvjax.cache import PageLedger
from kvjax.infer.compilations import CompilationCount
from kvjax.infer.engine import Engine
from kvjax.infer.planners import PLANNED, POLICIES, make_planner
from kvjax.plan import Grid, Request, plan_prefixes

pytestmark = pytest.mark.slow

GRID = Grid(
    page_size=4, max_rows=8, pages_per_row=16, row_buckets=(8,), token_buckets=(32,),
    split_pages=3, tile_queries=8, decode_steps=4, shared_pages=1,
)  # fmt: skip


def make_requests():
    """Documents of 9 to 21 tokens after one beginning of 9, two to four questions on each; equal
    prompts, one that is another's beginning, one that shares nothing; answers of 1 to 9 tokens."""
    rng = np.random.default_rng(17)  # no two likeliest tokens within 0.02 of each other
    system = rng.integers(0, 300, 9).tolist()
    prompts = [rng.integers(0, 300, 11).tolist()]
    for document in range(4):
        text = [*system, *rng.integers(0, 300, 9 + 4 * document).tolist()]
        for _ in range(2 + document % 3):
            prompts.append([*text, *rng.integers(0, 300, rng.integers(1, 7)).tolist()])
    prompts += [prompts[-1], prompts[-1][:17], system[:8]]
    order = rng.permutation(len(prompts))
    return [
        Request(id=i, prompt=tuple(prompts[k]), max_tokens=1 + int(k) % 9)
        for i, k in enumerate(order)
    ]


@pytest.fixture(scope="module")
def expected():
    """Greedy answers one by one, without a cache."""
    logits = models_for_tests.dense_logits(*models_for_tests.random_decoder())
    requests = make_requests()
    tokens = [list(request.prompt) for request in requests]
    for step in range(9):
        padded = np.zeros((len(tokens), 64), np.int32)
        for row, so_far in zip(padded, tokens, strict=True):
            row[: len(so_far)] = so_far
        scores = np.asarray(logits(jnp.asarray(padded)))
        for request, so_far, row in zip(requests, tokens, scores, strict=True):
            if step < request.max_tokens:
                best = np.sort(row[len(so_far) - 1])
                assert best[-1] - best[-2] > 1e-3, "too close to tell apart in float32"
                so_far.append(int(row[len(so_far) - 1].argmax()))
    return {r.id: t[len(r.prompt) :] for r, t in zip(requests, tokens, strict=True)}


@pytest.fixture(scope="module")
def engine():
    engine = Engine(*models_for_tests.random_decoder(), models_for_tests.CONFIG, GRID, 128)
    engine.warm_up()
    return engine


def answer(engine, requests, policy, num_pages=128, **options):
    planner = make_planner(policy, engine.grid, PageLedger(num_pages), **options)
    engine.planner = planner
    for request in requests:
        planner.add(request)
    answers, shared = {request.id: [] for request in requests}, 0
    while planner.busy:  # as `run` does, with a look at the plans
        for outputs in engine.run():
            for output in outputs:
                answers[output.id] += output.tokens
    assert planner.ledger.held == 0
    return answers, planner, shared


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_the_same_greedy_answers(engine, expected, policy):
    """In ample memory; what is computed is what was planned, to the token; nothing is compiled."""
    requests = make_requests()
    with CompilationCount() as compiled:
        answers, planner, _ = answer(engine, requests, policy)
    assert compiled.count == 0
    assert answers == expected
    total = sum(len(request.prompt) for request in requests)
    saved = total - planner.prefill_tokens_computed
    if policy in PLANNED:
        usable = [request.prompt[:-1] for request in requests]
        assert saved == plan_prefixes(usable, 4, policy).saved > 0
    assert (saved == 0) == (policy == "none")


@pytest.mark.parametrize("policy", ["multi", "exact", "fcfs-lru", "none"])
@pytest.mark.parametrize("optimistic", [False, True], ids=["safe", "optimistic"])
def test_scarce_memory_changes_no_answer(engine, expected, policy, optimistic):
    """12 pages: the longest request needs 11."""
    answers, planner, _ = answer(engine, make_requests(), policy, 12, optimistic=optimistic)
    assert answers == expected
    assert planner.ledger.peak <= 12
    if not optimistic:
        assert planner.preemptions == 0


def test_planned_rows_read_what_they_share_together(engine):
    """In the engine's own calls: some item spans queries of several rows."""
    planner = make_planner("multi", GRID, PageLedger(128))
    engine.planner = planner
    for request in make_requests():
        planner.add(request)
    spans, plan = 0, planner.plan

    def watched():
        planned = plan()
        if planned is not None:
            for _, _, _, first, end in planned.step.tiles[: int(planned.step.num_tiles)]:
                spans_rows = len(set(planned.step.row[first:end].tolist())) > 1
                nonlocal spans
                spans += spans_rows
        return planned

    planner.plan = watched
    for _ in engine.run():
        pass
    assert spans > 10


def test_rows_that_were_not_planned_read_together_too(engine, expected):
    assert answer(engine, make_requests(), "fcfs-lru", grouped=True)[0] == expected


@pytest.mark.parametrize(
    "sizes",
    [
        {"page_size": 1, "pages_per_row": 64, "token_buckets": (8,)},
        {"fixed": True, "tile_queries": 3, "decode_steps": 1, "page_size": 16, "pages_per_row": 4},
    ],
    ids=["pages of one token", "fixed shapes, large pages"],
)
def test_other_shapes(expected, sizes):
    grid = dataclasses.replace(GRID, **sizes)
    engine = Engine(*models_for_tests.random_decoder(), models_for_tests.CONFIG, grid, 600)
    engine.warm_up()
    for policy, pages in (("multi", 600), ("exact", 64 // grid.page_size)):
        assert answer(engine, make_requests(), policy, pages, optimistic=True)[0] == expected
