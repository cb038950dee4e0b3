"""What a searched tree answers: which solution, or which answer most of them come to."""

import math
import re
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from kvjax.errors import InputError
from kvjax.infer.search.tree import Node

__all__ = ["AGGREGATES", "VOTES", "Choice", "choose", "last_number_or_box", "same_answer"]

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda scores: scores[-1],
    "min": min,
    "mean": lambda scores: sum(scores) / len(scores),
    "prod": math.prod,
}
"""How the scores of a solution's steps become one."""
VOTES = ("best", "weighted", "majority")
"""best: the solution with the highest score; weighted: the answer whose solutions' scores sum to
most; majority: the answer that most solutions have."""


class Choice(NamedTuple):
    """The chosen answer, a leaf that gives it, and its weight; "" and None where there is none."""

    answer: str
    leaf: Node | None
    weight: float


def choose(
    leaves: Sequence[Node],
    *,
    vote: str = "weighted",
    aggregate: str = "last",
    extract: Callable[[str], str | None],
    same: Callable[[str, str], bool],
) -> Choice:
    """The answer of a tree's finished leaves.

    Leaves without an answer do not vote. Equal weights are decided by the best single score.

    Args:
        leaves: finished ones.
        vote: one of `VOTES`.
        aggregate: one of `AGGREGATES`.
        extract: the answer in a solution's text, or None.
        same: whether two answers are equal.
    """
    if vote not in VOTES or aggregate not in AGGREGATES:
        raise InputError(
            f"vote {vote!r} and aggregate {aggregate!r}: use one of {', '.join(VOTES)} and one of "
            f"{', '.join(AGGREGATES)}"
        )
    score = AGGREGATES[aggregate]
    found = [(answer, leaf, score(leaf.scores())) for leaf in leaves
             if (answer := extract(leaf.answer())) is not None]  # fmt: skip
    if not found:
        return Choice("", None, 0.0)
    if vote == "best":
        return Choice(*max(found, key=lambda x: x[2]))
    classes: list[list[tuple[str, Node, float]]] = []
    for one in found:
        own = next((c for c in classes if same(c[0][0], one[0])), None)
        if own is None:
            classes.append([one])
        else:
            own.append(one)

    def weight(members: list[tuple[str, Node, float]]) -> float:
        return sum(leaf.count * (score if vote == "weighted" else 1) for _, leaf, score in members)

    most = max(classes, key=lambda c: (weight(c), max(score for _, _, score in c)))
    answer, leaf, _ = max(most, key=lambda x: x[2])
    return Choice(answer, leaf, weight(most))


def last_number_or_box(text: str) -> str | None:
    r"""The answer of a mathematical solution: what \boxed{} holds, or what "answer is" announces.

    The last of them; None where there is none.
    """
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, begin = 1, start + len("\\boxed{")
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end].strip()
        return None
    found = re.findall(r"answer is:?\s*([^\n]+)", text)
    return found[-1].strip().rstrip(".").strip("$ ") or None if found else None


def same_answer(a: str, b: str) -> bool:
    r"""Whether two answers are the same text or the same number (1/2, \frac{1}{2}, 0.5, 50 %).

    Where the package `math-verify` is installed, what is neither is compared as mathematics:
    expressions, sets, intervals, equations. Text that it cannot read is equal to itself only.
    """
    plain = _plain(a), _plain(b)
    if plain[0] == plain[1]:
        return True
    numbers = [_number(x) for x in plain]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _same_mathematics(a, b)


def _same_mathematics(a: str, b: str) -> bool:
    try:
        import math_verify  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    # Its time limits are signals, which work in the main thread only.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    gold, other = (math_verify.parse(f"${x}$", parsing_timeout=limit) for x in (a, b))
    return bool(math_verify.verify(gold, other, timeout_seconds=limit))


def _plain(text: str) -> str:
    text = re.sub(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", r"(\1)/(\2)", text)
    text = re.sub(r"\\(left|right|!|,|;| )|\\text\{[^}]*\}|[\s$]", "", text)
    return text.replace("\\%", "%").replace("(", "").replace(")", "").rstrip(".")


def _number(text: str) -> Fraction | None:
    scale = Fraction(1, 100) if text.endswith("%") else Fraction(1)
    try:
        return Fraction(text.rstrip("%").replace(",", "")) * scale
    except (ValueError, ZeroDivisionError):
        return None
