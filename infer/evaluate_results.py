"""Results of an evaluation: what its answers say about each policy and budget, and a table."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.infer.evaluate_metrics import wilson

__all__ = ["show_table", "summarize_answers"]

Line = dict[str, Any]
_MEANS = (
    "bytes",
    "bytes_read",
    "bytes_full",
    "recall",
    "attention_error",
    "prefill_seconds",
    "select_seconds",
)
_RESAMPLES = 1000


def summarize_answers(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One result for each length, protocol, policy and budget, in the order of their first answers.

    `accuracy` is the mean over tasks, each as much as the others; `interval` is Wilson's at 95 %
    for as many prompts; `lost` is how much less than the whole cache on the same prompts, with the
    95 % interval of a paired bootstrap, where the whole cache was evaluated too.
    """
    groups: dict[tuple, list[Line]] = collections.defaultdict(list)
    for line in lines:
        groups[line["length"], line["protocol"], line["policy"], line["budget"]].append(line)
    return [_summary(key, group, groups) for key, group in groups.items()]


def _summary(key: tuple, lines: list[Line], groups: dict[tuple, list[Line]]) -> dict[str, Any]:
    length, protocol, policy, budget = key
    scores = _by_task(lines)
    accuracy = float(np.mean([np.mean(list(of_task.values())) for of_task in scores.values()]))
    low, high = wilson(accuracy, len(lines))
    result = {
        "length": length,
        "protocol": protocol,
        "policy": policy,
        "budget": budget,
        "accuracy": round(accuracy, 4),
        "interval": [round(low, 4), round(high, 4)],
        "prompts": len(lines),
    }
    for name in _MEANS:
        # Answers of earlier releases do not say what was read: all that was held.
        values = [line.get(name, line["bytes"]) for line in lines]
        result[name] = _plain(float(np.mean(values)))
    # The first batch of a shape compiles: the median is that of the others.
    result["tokens_per_second"] = _plain(np.median([x["tokens_per_second"] for x in lines]))
    whole = groups.get((length, protocol, "full", "full"))
    if whole and policy != "full":
        result["lost"] = _lost(scores, _by_task(whole))
    result["tasks"] = {
        task: round(float(np.mean(list(of_task.values()))), 4) for task, of_task in scores.items()
    }
    return result


def _plain(value: float) -> float | int:
    return round(value) if value >= 1000 else round(float(value), 6)


def _by_task(lines: Sequence[Line]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for line in lines:
        found[line["task"]][line["name"]] = line["score"]
    return found


def _lost(scores: dict[str, dict[str, float]], whole: dict[str, dict[str, float]]) -> list[float]:
    """How much is lost, and from what to what it may be by chance."""
    rng = np.random.default_rng(0)
    total = np.zeros(_RESAMPLES + 1)
    for task, of_task in scores.items():
        names = [name for name in of_task if name in whole.get(task, {})]
        lost = np.asarray([whole[task][name] - of_task[name] for name in names])
        drawn = rng.integers(0, len(lost), (_RESAMPLES, len(lost)))
        total += np.concatenate([[lost.mean()], lost[drawn].mean(axis=1)]) / len(scores)
    low, high = np.percentile(total[1:], [2.5, 97.5])
    return [round(float(x), 4) for x in (total[0], low, high)]


def show_table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    tasks = list(dict.fromkeys(task for result in results for task in result["tasks"]))
    head = ["policy", "budget", "bytes", "of all", "accuracy, %", "recall", "error", *tasks]
    rows = []
    for r in results:
        low, high = (100 * x for x in r["interval"])
        rows.append(
            [
                r["policy"],
                r["budget"],
                f"{r['bytes']:,}",
                f"{100 * r['bytes'] / r['bytes_full']:.1f} %",
                f"{100 * r['accuracy']:.1f} ({low:.1f} to {high:.1f})",
                f"{r['recall']:.2f}",
                f"{r['attention_error']:.2f}",
                *(f"{100 * r['tasks'][task]:.1f}" if task in r["tasks"] else "" for task in tasks),
            ]
        )
    parts = []
    for length, protocol in dict.fromkeys((r["length"], r["protocol"]) for r in results):
        own = [
            row
            for row, r in zip(rows, results, strict=True)
            if (r["length"], r["protocol"]) == (length, protocol)
        ]
        body = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *own])
        parts.append(f"Length {length}, protocol {protocol}:\n\n{body}")
    return "\n\n".join(parts)
