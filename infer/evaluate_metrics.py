"""How an answer is scored, from 0 to 1, and how sure a mean of such scores is."""

import collections
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence

__all__ = ["METRICS", "wilson"]


def exact(answer: str, right: Sequence[str]) -> float:
    """Whether it is a right answer, but for white space around it."""
    return float(answer.strip() in right)


def contains(answer: str, right: Sequence[str]) -> float:
    """The share of the right texts that stand in it, in any case (RULER's metric)."""
    return sum(text.lower() in answer.lower() for text in right) / len(right)


def contains_any(answer: str, right: Sequence[str]) -> float:
    """Whether one of the right texts stands in it, in any case (RULER's for questions)."""
    return float(any(text.lower() in answer.lower() for text in right))


def f1(answer: str, right: Sequence[str]) -> float:
    """F1 over words against the best of the right texts (LongBench's for questions)."""
    return max(_f1(_words(answer), _words(text)) for text in right)


def _words(text: str) -> list[str]:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(answer: list[str], right: list[str]) -> float:
    same = sum((collections.Counter(answer) & collections.Counter(right)).values())
    return 2 * same / (len(answer) + len(right)) if same else 0.0


METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "contains": contains,
    "contains_any": contains_any,
    "f1": f1,
}


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of `count` trials (Wilson 1927).

    >>> tuple(round(x, 3) for x in wilson(1.0, 1000))
    (0.996, 1.0)
    """
    if count == 0:
        return 0.0, 1.0
    centre = mean + z * z / (2 * count)
    spread = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
