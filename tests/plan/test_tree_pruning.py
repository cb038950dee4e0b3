"""REBASE's allocation and ETS's program: the worked example, and what must hold of any tree."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import random_level

from kvjax.errors import InputError
from kvjax.plan.tree_clusters import average_linkage, equal_keys
from kvjax.plan.tree_pruning import (
    Level,
    ets_select,
    objective,
    program_dynamic,
    program_exact,
    rebase_allocation,
    round_allocation,
    shares,
)

LAMBDAS_B = (0.1, 0.5, 1, 1.5, 2, 3)
LAMBDAS_D = (0, 0.5, 1, 1.4)
SCORES = np.array([0.9, 0.8, 0.7, 0.65, 0.5])
EXAMPLE = Level.uniform([-1, 0, 0, 0], [1, 1, 2, 2, 3], [0, 0, 0, 0, 1])


def brute_force(level, rewards, lambda_b, lambda_d):
    """The best value over all selections but the empty one."""
    n = len(rewards)
    return max(
        objective(level, rewards, np.array(kept, bool), lambda_b, lambda_d)[0]
        for kept in itertools.product((False, True), repeat=n)
        if any(kept)
    )


def test_the_example_is_dealt_out_as_in_the_paper_and_as_released():
    assert rebase_allocation(SCORES, 8, 0.2).tolist() == [4, 2, 1, 1, 0]
    assert round_allocation(SCORES, 8, 0.2).tolist() == [3, 2, 1, 1, 0]


@pytest.mark.parametrize(
    ("lambda_b", "lambda_d", "value", "kept", "dealt"),
    [
        (0, 0, 1.000000, [1, 1, 1, 1, 1], [4, 2, 1, 1, 0]),
        (0.5, 0, 0.611111, [1, 1, 1, 1, 0], [4, 2, 2, 0, 0]),
        (0.5, 0.5, 1.000000, [1, 1, 1, 1, 1], [4, 2, 1, 1, 0]),
        (1, 0, 0.305556, [1, 1, 0, 0, 0], [5, 3, 0, 0, 0]),
        (1, 1, 1.083333, [1, 1, 0, 0, 1], [5, 3, 0, 0, 0]),
        (1.5, 0.5, 0.333333, [1, 1, 0, 0, 0], [5, 3, 0, 0, 0]),
        (2, 1, 0.416667, [1, 1, 0, 0, 1], [5, 3, 0, 0, 0]),
        (3, 1, 0.000000, [1, 0, 0, 0, 0], [8, 0, 0, 0, 0]),
    ],
)
def test_the_worked_example(lambda_b, lambda_d, value, kept, dealt):
    rewards = shares(rebase_allocation(SCORES, 8, 0.2))
    found = ets_select(EXAMPLE, rewards, lambda_b, lambda_d)
    assert found.value == pytest.approx(value, abs=1e-6)
    assert found.leaves.astype(int).tolist() == kept
    alive = np.where(found.leaves, SCORES, -np.inf)
    assert rebase_allocation(alive, 8, 0.2).tolist() == dealt


def test_the_program_is_solved_exactly_however_nodes_are_priced():
    rng = np.random.default_rng(0)
    for case in range(120):
        level, rewards, _ = random_level(
            rng, leaves=int(rng.integers(3, 10)), uniform=bool(case % 2)
        )
        lambda_b, lambda_d = rng.choice(LAMBDAS_B), rng.choice(LAMBDAS_D)
        best = brute_force(level, rewards, lambda_b, lambda_d)
        found = program_exact(level, rewards, lambda_b, lambda_d)
        # The values are of order 1; 1e-9 is what adding a dozen of them in another order may do.
        assert found.value == pytest.approx(best, abs=1e-9)
        assert ets_select(level, rewards, lambda_b, lambda_d).value == pytest.approx(best, abs=1e-9)


def test_without_coverage_the_linear_program_finds_what_highs_finds():
    rng = np.random.default_rng(1)
    for _ in range(60):
        n = int(rng.choice([4, 16, 64, 256]))
        level, rewards, _ = random_level(rng, leaves=n, depth=int(rng.integers(2, 9)))
        lambda_b = float(rng.choice(LAMBDAS_B))
        fast = program_dynamic(level, rewards, lambda_b)
        assert fast.value == pytest.approx(
            program_exact(level, rewards, lambda_b, 0).value, abs=1e-9
        )


def test_where_nothing_costs_ets_is_rebase():
    rng = np.random.default_rng(2)
    for _ in range(1000):
        level, rewards, _ = random_level(rng)
        found = ets_select(level, rewards, 0.0, float(rng.choice(LAMBDAS_D)))
        assert found.leaves.all()


def test_where_everything_costs_one_leaf_is_left_and_the_cheapest_good_one():
    rng = np.random.default_rng(3)
    for _ in range(50):
        level, rewards, _ = random_level(rng, uniform=False)
        found = ets_select(level, rewards, 1e4, 0.0)
        alone = [
            objective(level, rewards, np.arange(len(rewards)) == i, 1e4, 0)[0]
            for i in range(len(rewards))
        ]
        assert found.leaves.sum() == 1
        assert found.value == pytest.approx(max(alone), rel=1e-12)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=64),
    st.integers(1, 256),
    st.sampled_from([0.1, 0.2, 0.4]),
)
@settings(max_examples=300, deadline=None)
def test_the_whole_width_is_dealt_out(scores, width, temperature):
    dealt = rebase_allocation(np.array(scores), width, temperature)
    assert dealt.sum() == width
    assert (dealt >= 0).all()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 256])
def test_equal_and_nearly_equal_scores_are_dealt_to_evenly(n):
    assert rebase_allocation(np.full(n, 0.5), 3 * n, 0.2).tolist() == [3] * n
    rng = np.random.default_rng(n)
    close = 0.5 + 1e-6 * rng.uniform(-1, 1, n)
    assert rebase_allocation(close, 5 * n, 0.2).sum() == 5 * n
    one_hot = np.where(np.arange(n) == n // 2, 1.0, -np.inf)
    assert rebase_allocation(one_hot, 17, 0.2)[n // 2] == 17


def test_nobody_alive_is_dealt_nothing():
    assert rebase_allocation(np.full(3, -np.inf), 8, 0.2).tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="temperature"):
        rebase_allocation(SCORES, 8, 0.0)


def test_a_higher_price_never_keeps_more_nodes_and_a_higher_worth_no_fewer_clusters():
    rng = np.random.default_rng(4)
    for _ in range(25):
        level, rewards, _ = random_level(rng)
        sizes = []
        for lambda_b in (0.05, 0.3, 0.7, 1.1, 1.6, 2.3, 3.1, 5.0):
            found = program_exact(level, rewards, lambda_b, 1.0)
            sizes.append(int(found.leaves.sum() + found.nodes.sum()))
        assert sizes == sorted(sizes, reverse=True)
        covered = [
            len(np.unique(level.cluster[program_exact(level, rewards, 1.0, lambda_d).leaves]))
            for lambda_d in (0.1, 0.6, 1.2, 2.5, 5.0)
        ]
        assert covered == sorted(covered)


def test_the_unit_of_worth_and_the_order_of_leaves_do_not_matter():
    rng = np.random.default_rng(5)
    for _ in range(25):
        level, rewards, scores = random_level(rng)
        rewards = rewards + 1e-4 * rng.random(len(rewards))  # no ties
        found = ets_select(level, rewards, 1.0, 1.0).leaves
        assert (ets_select(level, 7 * rewards, 7.0, 7.0).leaves == found).all()
        order = rng.permutation(len(rewards))
        shuffled = Level(
            parent=level.parent,
            leaf_parent=level.leaf_parent[order],
            node_cost=level.node_cost,
            leaf_cost=level.leaf_cost[order],
            cluster=level.cluster[order],
        )
        value = ets_select(shuffled, rewards[order], 1.0, 1.0).value
        assert value == pytest.approx(objective(level, rewards, found, 1.0, 1.0)[0], abs=1e-9)
        dealt = rebase_allocation(scores, 16, 0.2)
        assert (rebase_allocation(scores[order], 16, 0.2) == dealt[order]).all()


def test_ancestors_are_kept_exactly_with_their_leaves():
    rng = np.random.default_rng(6)
    for _ in range(50):
        level, rewards, _ = random_level(rng)
        found = ets_select(level, rewards, 1.0, float(rng.choice(LAMBDAS_D)))
        wanted = np.zeros(len(level.parent), bool)
        for node in level.leaf_parent[found.leaves]:
            while node >= 0:
                wanted[node] = True
                node = level.parent[node]
        assert (found.nodes == wanted).all()


def test_the_released_program_has_the_same_optimum():
    """200 trees that CBC solved, written as the released code writes the program."""
    golden = json.loads((Path(__file__).parent / "ets_witness.json").read_text())
    rng = np.random.default_rng(golden["seed"])
    for lambda_b, lambda_d, optimum in golden["cases"]:
        level, rewards, _ = random_level(rng, leaves=int(rng.integers(3, 33)))
        found = ets_select(level, rewards, lambda_b, lambda_d)
        # CBC's own tolerance of a row is 1e-7, and there are some ten rows that bind.
        assert found.value == pytest.approx(optimum, abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_average_linkage_joins_what_is_near_and_always_what_is_equal(seed):
    from scipy.cluster.hierarchy import fcluster, linkage

    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 65))
    centres = rng.normal(size=(4, 8))
    vectors = centres[rng.integers(0, 4, n)] + 0.2 * rng.normal(size=(n, 8))
    vectors[n // 2] = vectors[0]
    found = average_linkage(vectors, 0.05)
    assert found[n // 2] == found[0]
    tree = linkage(vectors, "average", metric="cosine")
    if np.abs(tree[:, 2] - 0.05).min() > 1e-4:
        expected = fcluster(tree, 0.05, "distance")
        assert ((found[:, None] == found) == (expected[:, None] == expected)).all()


def test_clusters_at_their_ends():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(9, 4))
    assert len(set(average_linkage(vectors, -1.0))) == 9
    assert len(set(average_linkage(vectors, 2.0))) == 1
    assert average_linkage(vectors[:1], 0.05).tolist() == [0]
    assert average_linkage(np.ones((5, 3)), 0.05).tolist() == [0] * 5
    assert equal_keys(["a", "b", "a"]).tolist() == [0, 1, 0]
