"""The game Countdown, written as text: problems, legal plays, and an exact judge.

A problem is `3 7 10 2 5>24`: five numbers and a target. A play takes two of the numbers at a time
and puts their sum, difference, product or exact quotient in their place, until one is left:

    3*7=21:10 2 5 21;21+5=26:10 2 26;10/2=5:26 5;...

Every number stands for itself, so each is used once. Results are whole and from 0 to 999. After the
colon stand the numbers that are left, so a step says which state it leads to. Different steps
lead to the same state (3*7 and 7*3): that is what makes the game a fair test of a search which
tells states apart. An early step that spoils the play cannot be mended later.
"""

import re
from typing import NamedTuple

import numpy as np

__all__ = [
    "DEEP_ENDS", "STEP_ENDS", "Problem", "calculate", "draw_problem", "judge", "problem",
    "read_problem", "state_key",
]  # fmt: skip

STEP_ENDS = (";",)
"""What ends a step where an operation is one step: four steps a play."""
DEEP_ENDS = ("=", ":", ";")
"""What ends a step where an operation is three (`3*7=`, `21:`, `10 2 5 21;`): twelve a play."""

_SIZE, _LARGEST, _LIMIT = 5, 20, 999
_LOW, _HIGH = 10, 300
_N = r"(0|[1-9]\d{0,2})"
_STEP = re.compile(rf"{_N}([-+*/]){_N}={_N}:((?:{_N} )*{_N})")
_PENDING = re.compile(rf"{_N}([-+*/]){_N}=(?:{_N}:)?")


class Problem(NamedTuple):
    """Numbers to use once each, and what to reach with them."""

    numbers: tuple[int, ...]
    target: int

    @property
    def text(self) -> str:
        """As a player is asked."""
        return f"{' '.join(map(str, self.numbers))}>{self.target}"


def problem(seed: int, index: int) -> tuple[Problem, str]:
    """The problem number `index` of a seed, which is sure to have a solution, and one of those.

    Five numbers from 1 to 20 are played at random; where that ends from 10 to 300 is the target.
    """
    rng = np.random.default_rng(np.random.SeedSequence((seed, index)))
    return draw_problem(rng)


def draw_problem(rng: np.random.Generator) -> tuple[Problem, str]:
    """A problem and a play that solves it, from a generator."""
    while True:
        chances = rng.random(_SIZE + 3 * (_SIZE - 1)).tolist()  # one call: numpy's are slow
        numbers = [1 + int(_LARGEST * chances.pop()) for _ in range(_SIZE)]
        play, end = _play(numbers, chances)
        if _LOW <= end <= _HIGH:
            return Problem(tuple(numbers), end), play


def _play(numbers: list[int], chances: list[float]) -> tuple[str, int]:
    """A random legal play: its text and where it ends."""
    left, steps = list(numbers), []
    while len(left) > 1:
        a = left.pop(int(chances.pop() * len(left)))
        b = left.pop(int(chances.pop() * len(left)))
        results = [(sign, calculate(a, sign, b)) for sign in "+-*/"]
        legal = [(sign, result) for sign, result in results if result is not None]
        if not legal:  # two numbers whose sum is too large, and the first the smaller
            return "", -1
        sign, result = legal[int(chances.pop() * len(legal))]
        left.append(result)
        steps.append(f"{a}{sign}{b}={result}:{' '.join(map(str, left))};")
    return "".join(steps), left[0]


def calculate(a: int, sign: str, b: int) -> int | None:
    """The result of a step, or None if it is illegal."""
    if sign == "/":
        return a // b if b and a % b == 0 else None
    result = a + b if sign == "+" else a - b if sign == "-" else a * b
    return result if 0 <= result <= _LIMIT else None


def read_problem(text: str) -> Problem:
    """The problem of a text such as `3 7 10 2 5>24`.

    Raises:
        ValueError: it is none.
    """
    numbers, _, target = text.strip().partition(">")
    return Problem(tuple(map(int, numbers.split())), int(target))


def judge(asked: Problem, answer: str) -> bool:
    """Whether an answer is a legal play that ends with the target."""
    left: list[int] | None = sorted(asked.numbers)
    steps = answer.strip().split(";")
    if len(steps) != len(asked.numbers) or steps.pop():
        return False
    for step in steps:
        left = _after(left, step)
        if left is None:
            return False
    return left == [asked.target]


def _after(left: list[int], step: str) -> list[int] | None:
    """The numbers after a step, sorted, or None if it is illegal or says what is not so."""
    found = _STEP.fullmatch(step)
    if found is None:
        return None
    a, b, result = int(found[1]), int(found[3]), int(found[4])
    after = _without(left, a, b)
    if after is None or calculate(a, found[2], b) != result:
        return None
    after = sorted([*after, result])
    return after if sorted(map(int, found[5].split())) == after else None


def _without(left: list[int], *used: int) -> list[int] | None:
    """The numbers but for those used; None if they are not there."""
    rest = list(left)
    for number in used:
        if number not in rest:
            return None
        rest.remove(number)
    return rest


def state_key(asked: Problem, answer: str) -> str:
    """The state that a play, whole or begun, has come to: equal texts are truly equal states.

    That is the sorted numbers that are left; within an operation those that it must lead to. Of a
    play that has gone wrong it is what the play says.
    """
    *steps, rest = answer.split(";")
    left = sorted(asked.numbers)
    for step in steps:
        after = _after(left, step)
        if after is None:
            said = step.rpartition(":")[2]
            after = sorted(map(int, re.findall(r"\d+", said)))
        left = after
    pending = _PENDING.match(rest)
    if pending is not None:
        a, b = int(pending[1]), int(pending[3])
        others, result = _without(left, a, b), calculate(a, pending[2], b)
        if others is None or result is None:
            return f"{left} {rest}"
        left = sorted([*others, int(pending[4] or result)])
    elif rest:
        return f"{left} {rest}"
    return " ".join(map(str, left))
