"""The words of the tasks, and the noise made of them.

Records, questions and noise draw from the same words, so that no sentence can be told from a
record by its vocabulary. Every word is one token of the tokenizer that `corpus` trains, and so is
every digit and every mark: `count_tokens` is exact.
"""

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = [
    "ADJECTIVES",
    "ATTRIBUTES",
    "DIRECTIONS",
    "NOUNS",
    "PLACES",
    "corpus",
    "count_tokens",
    "draw_gates",
    "draw_noise",
    "draw_numbers",
    "draw_pairs",
]

ATTRIBUTES = ("code", "price", "weight", "year")
ADJECTIVES = (
    "red", "blue", "green", "black", "white", "gold", "silver", "grey",
    "old", "young", "small", "big", "quiet", "loud", "brave", "calm",
    "fast", "slow", "tall", "short", "warm", "cold", "kind", "proud",
    "wise", "shy", "wild", "tame", "strong", "weak", "dark", "pale",
)  # fmt: skip
NOUNS = (
    "falcon", "heron", "otter", "badger", "fox", "wolf", "bear", "lion",
    "tiger", "horse", "rabbit", "beaver", "raven", "eagle", "lizard", "camel",
    "goat", "sheep", "crane", "duck", "frog", "hare", "lynx", "mole",
    "moose", "mouse", "owl", "seal", "swan", "toad", "trout", "wren",
)  # fmt: skip
DIRECTIONS = ("north", "south", "east", "west")
PLACES = ("gate", "bridge", "mill", "tower", "field", "harbour", "well", "barn")

# Each says something of a pair and its company, and nothing that a question asks for. {2} is an
# attribute, {3} a place, {4} a number; the one at `_ALONE` speaks of a single pair.
_NOISE = (
    "The {0} met the {1}.",
    "Some say the {0} saw the {1} at the {3}.",
    "The {2} of the {0} was never asked.",
    "Page {4} names the {0}.",
    "The {0} left the {3} before the {1}.",
    "Nobody counted the {0} in {4}.",
    "At the {3} the {0} waited.",
)
_ALONE = 2
_OTHERS = (
    "The the met Some say saw at was never asked of Page names left before Nobody counted in At "
    "waited is follows holds lives goes to first second third There came One went What are codes "
    "and Whom does follow Where live go end trail Which three animals were seen most way did "
    "How often Continue three codes prices weights years"
)
_OPENINGS = (
    "The", "the", "Some", "Page", "Nobody", "At", "One", "There", "What", "Whom", "Where", "Which",
    "How", "Continue", "First", "Most", "Often", "Sometimes", "Rarely",
)  # fmt: skip
_TOKEN = re.compile(r"[A-Za-z]+|\d| (?=\d)|[^\w\s]")


def count_tokens(text: str) -> int:
    """How many tokens a text has: words, digits, marks, and the space before a number."""
    return len(_TOKEN.findall(text))


def corpus() -> Iterator[str]:
    """Text with every word where it can stand: what the tokenizer is trained on."""
    inner = (*ATTRIBUTES, *ADJECTIVES, *NOUNS, *DIRECTIONS, *PLACES, *_OTHERS.split())
    yield " " + " ".join(inner)
    yield from _OPENINGS


def draw_pairs(rng: np.random.Generator, count: int, *, shared: bool = True) -> list[str]:
    """Different pairs of an adjective and a noun, such as "red falcon".

    Args:
        rng: draws.
        count: how many, at most 1024.
        shared: whether other pairs share the words of a pair; without it, which is for at most 32
            pairs, one word finds its pair.
    """
    adjectives, nouns = rng.permutation(len(ADJECTIVES)), rng.permutation(len(NOUNS))
    if not shared and count <= len(NOUNS):
        chosen = zip(adjectives[:count], nouns[:count], strict=True)
        return [f"{ADJECTIVES[a]} {NOUNS[n]}" for a, n in chosen]
    size = max(2, math.ceil(math.sqrt(1.5 * count)))
    size = min(len(NOUNS), size)
    cells = rng.permutation(size * size)[:count].tolist()
    return [f"{ADJECTIVES[adjectives[cell // size]]} {NOUNS[nouns[cell % size]]}" for cell in cells]


def draw_numbers(rng: np.random.Generator, count: int) -> list[str]:
    """Different numbers of four digits."""
    numbers: list[int] = []
    while len(numbers) < count:
        more = rng.integers(1000, 10_000, 2 * count).tolist()
        numbers = list(dict.fromkeys([*numbers, *more]))
    return [str(number) for number in numbers[:count]]


def draw_gates(rng: np.random.Generator, count: int) -> list[str]:
    """Places such as "north gate"; they may repeat."""
    drawn = rng.integers(0, (len(DIRECTIONS), len(PLACES)), (count, 2)).tolist()
    return [f"{DIRECTIONS[d]} {PLACES[p]}" for d, p in drawn]


def draw_noise(rng: np.random.Generator, tokens: int, pairs: Sequence[str] = ()) -> list[str]:
    """Sentences of at most `tokens` tokens, which say nothing that is asked for.

    Args:
        rng: draws.
        tokens: what is to be filled; less than a sentence may stay free.
        pairs: what the document speaks of; half of the noise speaks of it too.
    """
    count = max(0, tokens // 6) + 1
    firsts, seconds = _spoken_of(rng, count, pairs), _spoken_of(rng, count, pairs)
    kinds = rng.integers(0, len(_NOISE), count).tolist()
    attributes = rng.integers(0, len(ATTRIBUTES), count).tolist()
    numbers = rng.integers(1000, 10_000, count).tolist()
    gates = draw_gates(rng, count)
    sentences, left = [], tokens
    for row, (kind, first, second) in enumerate(zip(kinds, firsts, seconds, strict=True)):
        kind = _ALONE if first == second else kind  # nobody meets itself
        left -= _NOISE_TOKENS[kind]
        if left < 0:
            break
        what = first, second, ATTRIBUTES[attributes[row]], gates[row], numbers[row]
        sentences.append(_NOISE[kind].format(*what))
    return sentences


def _spoken_of(rng: np.random.Generator, count: int, pairs: Sequence[str]) -> list[str]:
    """Any pairs, half of them from `pairs` where there are some."""
    any_ones = rng.integers(0, len(NOUNS), (count, 2)).tolist()
    drawn = [f"{ADJECTIVES[a]} {NOUNS[n]}" for a, n in any_ones]
    own: list[int] = rng.integers(0, 2 * max(1, len(pairs)), count).tolist()
    return [pairs[i] if i < len(pairs) else other for i, other in zip(own, drawn, strict=True)]


_NOISE_TOKENS = tuple(
    count_tokens(text.format("red fox", "red fox", "code", "west mill", 1000)) for text in _NOISE
)
