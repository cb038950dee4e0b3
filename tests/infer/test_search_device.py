"""ETS's program on the device: how near it comes to the best, and that its bound is one."""

import numpy as np
import pytest
from random_trees import random_level

from kvjax.infer.search.device_program import make_device_program
from kvjax.plan.tree_pruning import ets_select, program_dynamic

LAMBDAS = [(b, d) for b in (0.5, 1.0, 1.5, 2.0, 3.0) for d in (0.5, 1.0, 1.4)]


@pytest.mark.parametrize("leaves", [16, 64])
def test_it_comes_near_to_the_best_and_says_how_near(leaves):
    program = make_device_program(leaves, 4 * leaves, 8)
    rng = np.random.default_rng(leaves)
    gaps = []
    for case in range(60):
        level, rewards, _ = random_level(rng, leaves=leaves, depth=int(rng.integers(3, 8)))
        lambda_b, lambda_d = LAMBDAS[case % len(LAMBDAS)]
        best = ets_select(level, rewards, lambda_b, lambda_d).value
        found = program(level, rewards, lambda_b, lambda_d)
        assert found.bound >= best - 1e-6  # float32 of values of order 1
        assert found.value <= best + 1e-9
        gaps.append(best - found.value)
    assert np.mean(gaps) <= 5e-3
    # A swap of whole branches is beyond changes of single leaves: once in a hundred levels that
    # leaves a few hundredths of an objective of order 1.
    assert np.max(gaps) <= 8e-2
    assert np.mean(np.array(gaps) < 1e-6) >= 0.7


def test_without_coverage_it_is_exact():
    program = make_device_program(12, 48, 8)
    rng = np.random.default_rng(0)
    for _ in range(60):
        level, rewards, _ = random_level(rng, clusters=False, uniform=False)
        lambda_b = float(rng.choice((0.5, 1.0, 2.0, 8.0)))
        best = program_dynamic(level, rewards, lambda_b).value
        found = program(level, rewards, lambda_b, 1.0)
        assert found.value == pytest.approx(best, abs=1e-6)
        assert found.leaves.any()


def test_a_level_that_does_not_fit_is_refused():
    level, rewards, _ = random_level(np.random.default_rng(0), leaves=12)
    with pytest.raises(ValueError, match="12 leaves"):
        make_device_program(8, 64, 8)(level, rewards, 1.0, 1.0)


def test_a_search_may_use_it():
    from kvjax.infer.search import ETS, Frontier, Node

    root = Node(None, (1, 2, 3))
    scores = [0.9, 0.8, 0.7, 0.65, 0.5]
    leaves = [Node(root, (i,), path=(i,), score=s) for i, s in enumerate(scores)]
    frontier = Frontier(leaves=leaves, width=8, full_width=8)
    clusters = lambda leaves: np.array([0, 0, 0, 0, 1])  # noqa: E731
    for lambda_b in (0.5, 1.0, 2.0):
        exact = ETS(lambda_b=lambda_b, lambda_d=1.5, clusters=clusters)
        device = ETS(
            lambda_b=lambda_b, lambda_d=1.5, clusters=clusters,
            program=make_device_program(8, 16, 4),
        )  # fmt: skip
        assert device.allocate(frontier).counts.tolist() == exact.allocate(frontier).counts.tolist()
