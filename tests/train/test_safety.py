"""The safety world: its exact answers beside brute force, and that its danger is as intended."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvjax.safety_exact import (
    best_of,
    least_harm,
    nucleus,
    nucleus_edges,
    nucleus_floor,
    unsafe_chance,
)  # fmt: skip
from kvjax.safety_world import END, SafetyWorld, sample

SMALL = SafetyWorld(
    seed=3, states=9, basin=2, degree=3, topics=2, vocab_size=40, length=5, limit=2, hazard=0.5,
    gateways=0.5,
)  # fmt: skip


def answers_from(world, topic, state, length):
    """Every sequence of edges: its probability, its harm, and whether it keeps to the nucleus."""
    inside = nucleus_edges(world, topic, 0.6)
    for edges in itertools.product(range(world.config.degree), repeat=length):
        at, chance, harm, kept = state, 1.0, 0, True
        for edge in edges:
            chance *= world.chance[topic, at, edge]
            harm += int(world.harm[at, edge])
            kept &= bool(inside[at, edge])
            at = world.to[at, edge]
        yield chance, harm, kept


@pytest.mark.parametrize("seed", range(4))
def test_dynamic_programs_agree_with_every_answer_counted(seed):
    world = SafetyWorld(**{**vars(SMALL), "seed": seed}).build()
    for topic, state, done in itertools.product(range(2), (0, 1, 4, 8), range(3)):
        all_of_them = list(answers_from(world, topic, state, 5))
        assert sum(chance for chance, _, _ in all_of_them) == pytest.approx(1, abs=1e-12)
        unsafe = sum(chance for chance, harm, _ in all_of_them if done + harm >= 2)
        # Sums of float64 in another order.
        assert unsafe_chance(world, topic)[done, state] == pytest.approx(unsafe, abs=1e-12)
        least = min(harm for _, harm, kept in all_of_them if kept)
        assert least_harm(world, topic, 0.6)[state] == least


def test_best_of_n_is_the_chance_that_all_are_unsafe():
    assert best_of(np.array([0.5, 1.0, 0.0]), 3) == pytest.approx((0.125 + 1) / 3)
    world, rng = SMALL.build(), np.random.default_rng(0)
    topic = np.arange(20_000) % 2
    unsafe = sample(world, rng, topic).harm(world)[:, -1] >= 2
    exact = np.mean([unsafe_chance(world, t)[0, 0] for t in range(2)])
    # Within four standard errors.
    assert abs(unsafe.mean() - exact) < 4 * np.sqrt(exact * (1 - exact) / 20_000)
    all_of_four = unsafe.reshape(-1, 4, 2).all(axis=1).mean(axis=0)
    expected = np.array([unsafe_chance(world, t)[0, 0] for t in range(2)]) ** 4
    assert (np.abs(all_of_four - expected) < 4 * np.sqrt(expected / 2500) + 1e-3).all()


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.int64, st.integers(1, 8), elements=st.integers(0, 5)).filter(lambda x: x.any()),
    st.floats(0.01, 0.99),
)
def test_the_nucleus_is_the_papers_set(counts, p):
    chance = counts / counts.sum()
    kept = nucleus(chance, p)
    for a, own in enumerate(chance):
        likelier = sum(other for other in np.sort(chance)[::-1] if other > own)
        # A sum that equals p but for rounding may fall on either side.
        assert kept[a] == (likelier < p and own > 0) or abs(likelier - p) < 1e-9
    assert kept[chance == chance.max()].all()
    assert (nucleus(chance, p) <= nucleus(chance, min(1.0, p + 0.1))).all()


def test_a_text_tells_its_walk():
    world, rng = SMALL.build(), np.random.default_rng(1)
    said = sample(world, rng, np.arange(6) % 2, prefill=3)
    for row in range(6):
        states, harm, read = world.walk(said.answers[row])
        assert read == 8
        assert (states == said.states[row]).all()
        assert (harm[1:] == said.harm(world)[row]).all()
        assert not world.in_basin[states[:4]].any()
    assert world.walk(np.array([0]))[2] == 0
    assert (said.encoded(world)[:, -1] == END).all()
    for state in range(9):
        assert world.next_tokens(0, state).sum() == pytest.approx(1)
        assert np.count_nonzero(world.next_tokens(0, state)) == 6


def test_rewards_judge_the_present():
    world, rng = SMALL.build(), np.random.default_rng(2)
    said = sample(world, rng, np.zeros(2000, int))
    rewards, harm = said.rewards(world, rng, noise=0.0), said.harm(world)
    flat = world.in_basin[said.states[:, 1:]]
    nuisance = rewards - (6.0 - 4 * harm + 1.5 * flat)
    first = world.nuisance[said.states[:, 0], said.edges[:, 0]]
    np.testing.assert_allclose(nuisance[:, 0], first, atol=1e-5)  # float32
    second = 0.7 * first + world.nuisance[said.states[:, 1], said.edges[:, 1]]
    np.testing.assert_allclose(nuisance[:, 1], second, atol=1e-5)


def test_the_default_world_is_aligned_but_shallowly():
    """About as the paper's: 0.9 unsafe after a prefill, and much of it stays with 32 answers."""
    world, rng = SafetyWorld(seed=7).build(), np.random.default_rng(0)
    topic = rng.integers(0, 16, 400)
    start = sample(world, rng, topic, prefill=10, length=10).states[:, -1]
    exact = [unsafe_chance(world, t) for t in range(16)]
    chance = np.array([exact[t][0, s] for t, s in zip(topic, start, strict=True)])
    assert np.mean([table[0, 0] for table in exact]) < 0.05
    assert 0.85 < best_of(chance, 1) < 0.98
    assert best_of(chance, 32) > 0.3
    floors = [nucleus_floor(world, topic, start, p) for p in (0.5, 0.8, 0.95)]
    assert floors == sorted(floors, reverse=True)
    assert floors[0] > 0.4
    assert floors[1] < 0.15


def test_a_world_is_a_function_of_its_numbers():
    a, b, c = SMALL.build(), SMALL.build(), SafetyWorld(**{**vars(SMALL), "seed": 4}).build()
    assert (a.chance == b.chance).all()
    assert (a.tokens == b.tokens).all()
    assert not (a.chance == c.chance).all()
