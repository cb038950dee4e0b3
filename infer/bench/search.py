"""`kvjax bench search`: tree searches beside each other, by what they solve and what they hold.

Problems are Countdown's, judged exactly. Every search has the same problems and seeds, so that two
of them differ by less than either is uncertain: differences come with paired bootstrap intervals.

With `--out` each search's figures are a line of a file as soon as they are there, and searches that
the file has are not run again. Several processes, each with some of the searches, may share a file:
where the host is the bottleneck, they use its cores. One with all of them then shows the table.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from kvjax.errors import InputError
from kvjax.infer.commands.search import Question, least_page, load_models, search_all
from kvjax.infer.commands.shared import parse_arguments, warm_up
from kvjax.infer.compilations import CompilationCount
from kvjax.infer.search.loop import Cost, Searched
from kvjax.infer.search.methods import MethodOptions, read_method
from kvjax.infer.search.tasks import TASKS, SearchTask
from kvjax.models.countdown.game import problem

__all__ = ["BenchSearch", "bootstrap_interval", "main"]

_DEFAULT = ("rebase", "dvts", "ets,clusters=state,lambda_b=2,floor_one=no")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSearch:
    """Measure tree searches beside each other on problems of Countdown."""

    runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN ...")] = _DEFAULT
    """Searches, such as ets,width=64,lambda_b=1.5,clusters=state: `kvjax search --help` has the
    names. Those without a width have --width."""
    width: int = 8
    """Continuations of a level."""
    task: str = "countdown"
    """countdown, or countdown-deep, where each operation is three steps."""
    problems: int = 100
    """How many."""
    seeds: int = 1
    """Searches of each problem."""
    first_seed: int = 0
    """Of the draws."""
    problem_seed: int = 4_000_000
    """Of the problems; training and its evaluation have others."""
    reference: str = "rebase"
    """To which of the runs the others are compared."""
    policy_model: Annotated[str, tyro.conf.arg(name="policy", metavar="MODEL")] = "countdown"
    """A folder or a built-in model."""
    reward: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """A folder with reward.json; by default the policy itself."""
    at_a_time: int = 8
    """Problems that are searched together."""
    page_size: int = dataclasses.field(default_factory=least_page)
    """Tokens of a page; what is counted in tokens does not depend on it."""
    dtype: str | None = None
    """float32 or bfloat16; by default as the weights are stored, on the CPU float32."""
    max_rows: int = 512
    """The most rows of the engine."""
    shared_reads: bool = False
    """Read pages that leaves share once for all of them."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Takes a JSON object for each search as soon as it has ended; searches that are in it already
    are not run again."""
    json: bool = False
    """End with one JSON object on stdout."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that figures depend on, beside the search itself."""
        apart = ("runs", "width", "reference", "out", "json")
        return {name: v for name, v in dataclasses.asdict(self).items() if name not in apart}


def bootstrap_interval(
    a: np.ndarray, b: np.ndarray, seed: int = 0, draws: int = 4000
) -> tuple[float, float]:
    """The 95 % interval of the mean difference a - b of paired outcomes float[n]."""
    rng = np.random.default_rng(seed)
    difference = a - b
    chosen = rng.integers(0, len(difference), (draws, len(difference)))
    low, high = np.quantile(difference[chosen].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def _figures(
    task: SearchTask, questions: Sequence[Question], trees: list[Searched], right: np.ndarray,
    costs: list[Cost], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    covered = [
        any(task.right(question.text, leaf.answer(), None) for leaf in tree.ended)
        for question, tree in zip(questions, trees, strict=True)
    ]
    mean = [_means(tree) for tree in trees if tree.levels]
    keys = mean[0] if mean else {}
    return {
        "accuracy": round(float(right.mean()), 4),
        "coverage": round(float(np.mean(covered)), 4),
        **{key: round(float(np.mean([m[key] for m in mean])), 2) for key in keys},
        "tokens": round(float(np.mean([tree.tokens for tree in trees])), 1),
        "calls": round(float(np.mean([tree.calls for tree in trees])), 1),
        "pages_peak": max(cost.pages_peak for cost in costs),
        "kv_peak_bytes": max(cost.pages_peak * cost.page_bytes for cost in costs),
        "pages_live": round(float(np.mean([p for cost in costs for p in cost.pages_after[1:]])), 1),
        "seconds": round(seconds, 2),
        "policy_seconds": round(sum(cost.policy_seconds for cost in costs), 2),
        "reward_seconds": round(sum(cost.reward_seconds for cost in costs), 2),
        "select_seconds": round(sum(cost.select_seconds for cost in costs), 2),
        "solved": "".join(str(int(r)) for r in right),
    }


def _means(tree: Searched) -> dict[str, float]:
    """Of a tree's levels: tokens of the cache as the paper counts, of what lives on, of that what
    is different, and leaves.
    """
    levels = tree.levels
    return {
        "kv_pre": float(np.mean([level.before.nodes for level in levels])),
        "kv_live": float(np.mean([level.after.nodes for level in levels])),
        "kv_unique": float(np.mean([level.before.unique for level in levels])),
        "kv_live_unique": float(np.mean([level.after.unique for level in levels])),
        "kept": float(np.mean([level.kept for level in levels])),
        "continued": float(np.mean([level.continued for level in levels])),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_arguments(BenchSearch, "kvjax bench search", argv)
    if args.task not in TASKS or TASKS[args.task].state is None:
        raise InputError(f"--task {args.task!r}: use countdown or countdown-deep")
    runs = {name: _options(name, args.width) for name in args.runs}
    task = TASKS[args.task]
    for options in runs.values():
        options.check(task)
    results = _read(args, runs)
    missing = {name: options for name, options in runs.items() if name not in results}
    compiled = _run(args, task, missing, results) if missing else {}
    results = {name: results[name] for name in runs}
    _compare(args, results)
    result = {
        "device": jax.devices()[0].device_kind, **args.settings, **compiled, "runs": results,
    }  # fmt: skip
    if args.json:
        print(json.dumps(result))
    return 0


def _run(
    args: BenchSearch, task: SearchTask, runs: dict[str, MethodOptions],
    results: dict[str, dict[str, Any]],
) -> dict[str, int]:  # fmt: skip
    """Runs searches, adds their figures to `results`, and says how many programs were compiled."""
    widest = max(options.width for options in runs.values())
    llm, reward = load_models(
        args.policy_model, args.reward, rows=min(args.max_rows, widest * args.at_a_time),
        page_size=args.page_size, dtype=args.dtype, kv_memory=None,
        shared_reads=args.shared_reads,
    )  # fmt: skip
    start = time.perf_counter()
    with CompilationCount() as warming:
        for model in {id(m): m for m in (llm, reward.llm)}.values():
            warm_up(model)
    _say(f"{warming.count} programs in {time.perf_counter() - start:.1f} s")
    questions = [Question(problem(args.problem_seed, i)[0].text) for i in range(args.problems)]
    with CompilationCount() as compiled:
        for name, options in runs.items():
            results[name] = _measure(args, llm, reward, task, options, questions, _Progress(name))
            _write(args, options, results[name])
            print(
                _line(name, results[name]), file=sys.stderr if args.json else sys.stdout, flush=True
            )
    return {
        "compilations_of_warmup": warming.count, "compilations_after_warmup": compiled.count,
    }  # fmt: skip


def _read(args: BenchSearch, runs: dict[str, MethodOptions]) -> dict[str, dict[str, Any]]:
    """Figures of the runs that the file has, by their names.

    Raises:
        InputError: there is something else in it.
    """
    if args.out is None or not args.out.exists():
        return {}
    try:
        lines = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
        same = [line for line in lines if line["settings"] == _plain(args.settings)]
        known = {json.dumps(line["options"]): line["figures"] for line in same}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{args.out}: no file of kvjax bench search: give another --out") from None
    keys = {name: json.dumps(_plain(dataclasses.asdict(o))) for name, o in runs.items()}
    return {name: known[key] for name, key in keys.items() if key in known}


def _write(args: BenchSearch, options: MethodOptions, figures: dict[str, Any]) -> None:
    if args.out is None:
        return
    line = {"options": dataclasses.asdict(options), "settings": args.settings, "figures": figures}
    try:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")  # in one piece, whoever else writes to it
    except OSError as e:
        raise InputError(f"{args.out}: cannot be written ({e.strerror})") from None


def _plain(value: Any) -> Any:
    """As it comes out of a file."""
    return json.loads(json.dumps(value))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Progress:
    """Says now and then how far a run has come."""

    def __init__(self, name: str, seconds: float = 15.0) -> None:
        self._name, self._seconds, self._last = name, seconds, time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        if time.monotonic() - self._last > self._seconds:
            self._last = time.monotonic()
            _say(f"{self._name}: {done} of {of} problems")


def _options(name: str, width: int) -> MethodOptions:
    options = read_method(name)
    return options if "width=" in name else dataclasses.replace(options, width=width)


def _measure(
    args: BenchSearch, llm: Any, reward: Any, task: SearchTask, options: MethodOptions,
    questions: list[Question], progress: Callable[[int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """Searches all problems with all seeds."""
    trees, costs, right, start = [], [], [], time.perf_counter()
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        found, choices, cost = search_all(
            llm, reward, task, options, questions, at_a_time=args.at_a_time, seed=seed,
            progress=progress,
        )  # fmt: skip
        trees += found
        costs += cost
        for question, choice in zip(questions, choices, strict=True):
            text = choice.leaf.answer() if choice.leaf else ""
            right.append(float(task.right(question.text, text, None)))
    seconds = time.perf_counter() - start
    return _figures(task, questions * args.seeds, trees, np.asarray(right), costs, seconds)


def _compare(args: BenchSearch, results: dict[str, dict[str, Any]]) -> None:
    """Adds to each run its difference to the reference."""
    if args.reference not in results:
        return
    # Seeds of one problem are not independent: a problem is drawn with all of them.
    solved = {
        name: np.asarray([int(c) for c in run["solved"]], float).reshape(args.seeds, -1).mean(0)
        for name, run in results.items()
    }
    for name, run in results.items():
        if name != args.reference:
            low, high = bootstrap_interval(solved[name], solved[args.reference])
            mean = float((solved[name] - solved[args.reference]).mean())
            run["against_reference"] = [round(x, 4) for x in (mean, low, high)]
            run["kv_live_ratio"] = round(
                results[args.reference].get("kv_live", math.nan) / max(run.get("kv_live", 0), 1), 3
            )


def _line(name: str, run: dict[str, Any]) -> str:
    return (
        f"{name}: {run['accuracy']:.1%} solved, {run['coverage']:.1%} covered, "
        f"{run.get('kv_pre', 0):.0f} tokens before and {run.get('kv_live', 0):.0f} after pruning, "
        f"{run['seconds']:.1f} s"
    )
