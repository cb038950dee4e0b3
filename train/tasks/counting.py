"""T6, aggregation: how often animals were seen. No sentence alone has the answer."""

import numpy as np

from kvjax.train.tasks.example import Example, Setting, begin, finish, most, turns_tokens
from kvjax.train.tasks.words import ADJECTIVES, DIRECTIONS, NOUNS

__all__ = ["OFTEN", "RARELY", "counting"]

_SIGHTING = 6  # tokens of "One red falcon went north."
_TURN = 15
OFTEN = 0.2  # a larger share of the sightings is "Often"
RARELY = 0.1  # up to this share is "Rarely", between the two "Sometimes"


def counting(rng: np.random.Generator, setting: Setting) -> Example:
    """T6: sightings, and questions of three kinds about all of them.

    Which three animals were seen most, in order; which way most went; whether an animal was seen
    often (more than a fifth of the sightings), rarely (a tenth or fewer) or sometimes. Counts keep
    clear of each other and of these bounds. Noise names the same animals without seeing them.
    """
    tokens = begin(rng, setting)
    count = most(tokens, setting, _TURN)
    room = max(10, (tokens - 3 - turns_tokens(count, _TURN)) // _SIGHTING)
    seen = int(rng.integers(max(10, int(0.6 * room)), room, endpoint=True))
    nouns = [NOUNS[i] for i in rng.permutation(len(NOUNS))]
    counts = dict(zip(nouns, _counts(rng, seen), strict=False))
    ways = [DIRECTIONS[i] for i in rng.permutation(len(DIRECTIONS))]
    directions = _directions(rng, seen, ways)
    adjectives = rng.integers(0, len(ADJECTIVES), seen).tolist()
    animals = [noun for noun, times in counts.items() for _ in range(times)]
    facts = [
        f"One {ADJECTIVES[adjectives[i]]} {animals[i]} went {directions[i]}." for i in range(seen)
    ]
    turns = _turns(rng, count, counts, ways[0])
    pairs = [f"{ADJECTIVES[a]} {noun}" for a, noun in zip(adjectives, animals, strict=True)]
    return finish(rng, "counting", tokens, facts, turns, pairs)


def _counts(rng: np.random.Generator, seen: int) -> list[int]:
    """Counts in descending order: about .37, .24 and .14 of all, and many small ones."""
    shares = rng.uniform((0.34, 0.22, 0.13), (0.40, 0.26, 0.155))
    third = max(2, round(shares[2] * seen))
    second = max(third + 1, round(shares[1] * seen))
    counts = [max(second + 1, round(shares[0] * seen)), second, third]
    cap = max(1, int(rng.integers(seen // 32, seen // 16, endpoint=True)))
    while rest := seen - sum(counts):
        counts.append(min(rest, cap))
    return counts


def _directions(rng: np.random.Generator, seen: int, ways: list[str]) -> list[str]:
    """A way for each sighting, in any order; about half of them the first."""
    major = round(rng.uniform(0.45, 0.6) * seen)
    others = [ways[1 + i % 3] for i in range(seen - major)]
    drawn = [ways[0]] * major + others
    return [drawn[i] for i in rng.permutation(seen)]


def _turns(
    rng: np.random.Generator, count: int, counts: dict[str, int], way: str
) -> list[tuple[str, str]]:
    """Questions of all three kinds where three are asked or more, else of some, in any order."""
    animals, total = list(counts), sum(counts.values())
    rare = [animals[i] for i in 3 + rng.permutation(len(animals) - 3)[:3]]
    asked = [*animals[:3], *rare]  # as many often or sometimes as rarely
    often = [
        (f"How often was the {animal} seen?", _often(counts[animal] / total))
        for animal in (asked[i] for i in rng.permutation(len(asked)))
    ]
    turns = [
        ("Which three animals were seen most?", "The {}, the {}, the {}".format(*animals[:3])),
        ("Which way did most go?", f"Most went {way}"),
        often[0],
    ]
    turns = ([turns[i] for i in rng.permutation(3)] + often[1:])[:count]
    return [turns[i] for i in rng.permutation(len(turns))]


def _often(share: float) -> str:
    return "Often" if share > OFTEN else "Rarely" if share <= RARELY else "Sometimes"
