"""What is true of a safety world, by dynamic programming over states and harm done.

All of it is exact: the probability that an answer is unsafe, what best-of-N can reach with a
perfect judge, and the floor below which no search goes that keeps to the nucleus.
"""

import numpy as np

from kvjax.safety_world import World

__all__ = ["best_of", "least_harm", "nucleus", "nucleus_edges", "nucleus_floor", "unsafe_chance"]


def unsafe_chance(world: World, topic: int, length: int | None = None) -> np.ndarray:
    """The probability that the speaker does harm `limit` times.

    Args:
        world: the speaker's.
        topic: of the prompt.
        length: tokens to go; None is the whole answer.

    Returns:
        float64[limit + 1, S], by the harm already done and the state: p_i of a prompt is the entry
        [0, s] of the state where its prefill ends.
    """
    limit, chance = world.config.limit, world.chance[topic]
    unsafe = np.zeros((limit + 1, world.config.states))
    unsafe[limit] = 1
    done = np.minimum(np.arange(limit + 1)[:, None, None] + world.harm, limit)
    for _ in range(world.config.length if length is None else length):
        unsafe = np.sum(chance * unsafe[done, world.to], axis=-1)
    return unsafe


def best_of(chance: np.ndarray, count: int) -> float:
    """The mean of p^N over prompts: how often all of N answers are unsafe."""
    return float(np.mean(np.asarray(chance) ** count))


def nucleus(chance: np.ndarray, p: float) -> np.ndarray:
    """bool[..., V]: the tokens whose likelier ones together have less than p (eq. 2 of the paper).

    Ties stand or fall together, and the likeliest token is always in.

    Args:
        chance: float[..., V] probabilities.
        p: the threshold.
    """
    order = np.argsort(-chance, axis=-1, kind="stable")
    ranked = np.take_along_axis(chance, order, axis=-1)
    before = np.cumsum(ranked, axis=-1) - ranked
    # Equal ones share what is before the first of them.
    first = np.ones(ranked.shape, bool)
    first[..., 1:] = ranked[..., 1:] < ranked[..., :-1]
    before = np.maximum.accumulate(np.where(first, before, 0), axis=-1)
    kept = np.empty_like(first)
    np.put_along_axis(kept, order, (before < p) & (ranked > 0), axis=-1)
    return kept


def nucleus_edges(world: World, topic: int, p: float) -> np.ndarray:
    """bool[S, D]: the edges of which some token is in the nucleus of its state."""
    chance = world.chance[topic][..., None] * world.synonym_chance().reshape(1, 1, -1)
    kept = nucleus(chance.reshape(len(chance), -1), p)
    return np.asarray(np.any(kept.reshape(chance.shape), axis=-1))


def least_harm(world: World, topic: int, p: float, length: int | None = None) -> np.ndarray:
    """int[S]: the least harm of all answers from a state that keep to the nucleus."""
    kept, harm = nucleus_edges(world, topic, p), np.zeros(world.config.states, int)
    for _ in range(world.config.length if length is None else length):
        ways = world.harm + harm[world.to]
        harm = np.min(np.where(kept, ways, np.iinfo(int).max), axis=-1)
    return harm


def nucleus_floor(world: World, topic: np.ndarray, start: np.ndarray, p: float) -> float:
    """The share of prompts without a safe answer in the nucleus.

    Args:
        world: the speaker's.
        topic: int[n].
        start: int[n], the states where the prefills end.
        p: of the nucleus.
    """
    least = {int(t): least_harm(world, int(t), p) for t in np.unique(topic)}
    harm = [least[int(t)][s] for t, s in zip(topic, start, strict=True)]
    return float(np.mean(np.array(harm) >= world.config.limit))
