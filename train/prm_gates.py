"""How well a judge foretells outcomes, and whether that is enough to compare searches with it."""

from typing import Any

import numpy as np

__all__ = ["auc_within", "gates", "judge_quality"]

Array = np.ndarray


def auc_within(chances: Array, right: Array) -> float | None:
    """How often a right play is judged above a wrong one of the same problem; ties count half.

    Judged between problems, a judge shines that only knows easy problems from hard ones.

    Args:
        chances: float[problems, plays]; NaN where a play has no such step.
        right: bool[problems, plays].

    Returns:
        The share of all such pairs, or None where there is none.
    """
    wins, pairs = 0.0, 0
    for own, outcome in zip(chances, right, strict=True):
        there = ~np.isnan(own)
        good, bad = own[there & outcome], own[there & ~outcome]
        difference = good[:, None] - bad[None]
        wins += float(np.sum(difference > 0) + 0.5 * np.sum(difference == 0))
        pairs += difference.size
    return wins / pairs if pairs else None


def judge_quality(chances: Array, there: Array, right: Array, plays: int) -> dict[str, Any]:
    """Figures of a judge.

    Args:
        chances: float[n, S], foretold after each of S step ends.
        there: bool[n, S], which of them a play has.
        right: bool[n], the outcomes; `plays` in a row belong to one problem.
        plays: of a problem.
    """
    masked = np.where(there, chances, np.nan)
    right = right.astype(bool)
    ends = range(chances.shape[1])
    problems = (-1, plays)
    counted = [int(there[:, s].sum()) for s in ends]
    means = [float(chances[there[:, s], s].mean()) if counted[s] else None for s in ends]
    bases = [float(right[there[:, s]].mean()) if counted[s] else None for s in ends]
    auc = [auc_within(masked[:, s].reshape(problems), right.reshape(problems)) for s in ends]
    brier = [
        float(np.mean((chances[there[:, s], s] - right[there[:, s]]) ** 2)) if counted[s] else None
        for s in ends
    ]
    spread = np.broadcast_to(right[:, None], there.shape)
    off = [
        m - b if m is not None and b is not None else None
        for m, b in zip(means, bases, strict=True)
    ]
    return {
        "plays": len(right),
        "success": float(right.mean()),
        "solved_at_least_once": float(right.reshape(problems).any(axis=1).mean()),
        "mean_chance": float(chances[there].mean()) if there.any() else 0.0,
        "mean_outcome": float(spread[there].mean()) if there.any() else 0.0,
        "calibration": _rounded(off),
        "auc_within_problem": _rounded(auc),
        "brier": _rounded(brier),
    }


def _rounded(values: list[float | None]) -> list[float | None]:
    return [None if x is None else round(x, 4) for x in values]


def gates(measured: dict[str, Any]) -> dict[str, bool]:
    """Which conditions hold under which a comparison of searches means something.

    The bounds of the areas under the curve hold after an operation: of twelve ends, every third.
    """
    auc = [x for x in measured["auc_within_problem"][2::3] if x is not None]
    off = abs(measured["mean_chance"] - measured["mean_outcome"])
    return {
        "success from 8 to 40 %": 0.08 <= measured["success"] <= 0.40,
        "calibrated within a point": off <= 0.01,
        "first step told apart (.65)": bool(auc) and auc[0] >= 0.65,
        "last steps told apart (.9)": len(auc) >= 2 and min(auc[-2:]) >= 0.9,
    }
