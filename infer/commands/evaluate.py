"""`kvjax eval`: what is lost and what is saved when a cache is compressed."""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from tqdm import tqdm

from kvjax.errors import InputError
from kvjax.infer.commands.shared import parse_arguments
from kvjax.infer.compilations import keep_compilations
from kvjax.infer.evaluate import Model, combine, evaluate
from kvjax.infer.evaluate_data import make_from_files, task_names
from kvjax.infer.evaluate_report import write_report
from kvjax.infer.evaluate_results import show_table, summarize_answers
from kvjax.infer.evaluate_suite import Suite, read_suite

__all__ = ["Eval", "main"]

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Answer prompts from compressed caches; show accuracy, bytes and time of each policy.

    A policy may be followed by its options: snapkv:last=16,kernel=7. What is not given is the
    suite's. With --out the answers are kept, and the same command goes on after an interruption.
    """

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "tiny"
    """A Hugging Face folder, a finished run of `kvjax train lm`, or a built-in model (tiny)."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="TYPE")] = None
    """float32 or bfloat16; by default as the weights are stored."""
    suite: str = "smoke"
    """smoke (under 3 minutes on two CPU cores) or tiny (the whole comparison)."""
    data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[FILE ...]")] = ()
    """JSON lines of LongBench or RULER instead of the suite's prompts; a file is a task."""
    policies: Names = ()
    """Which policies; full keeps everything."""
    budgets: Names = ()
    """Such as 1/8, 12%, 256 (tokens a head) or 1MiB (bytes a prompt)."""
    tasks: Names = ()
    """Which of the suite's tasks."""
    lengths: tuple[int, ...] = ()
    """Tokens that a prompt and its answer fill, or at most have, with --data."""
    protocols: Names = ()
    """A: the question is compressed with its context; B: it comes after the compression."""
    tags: Annotated[str | None, tyro.conf.arg(metavar="WHICH")] = None
    """What policies are told of a prompt's task: true, wrong, none, or what the classifier says."""
    prompts: int | None = None
    """How many of each task and length."""
    max_tokens: int = 64
    """With --data, tokens of an answer at most."""
    rows: int | None = None
    """Prompts that are computed at a time."""
    page_size: int | None = None
    """Tokens of a page."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Keep answers.jsonl here, and write results.json, the pictures and report.html."""
    json: bool = False
    """End with one JSON object on stdout."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_arguments(Eval, "kvjax eval", argv)
    suite = _suite(args)
    combine(suite)  # what is wrong with a name is said before anything is loaded
    keep_compilations()
    start = time.perf_counter()
    model = Model.load(args.model, args.dtype)
    if args.out is None:
        with tempfile.TemporaryDirectory() as folder:
            lines = _evaluate(model, suite, Path(folder))
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        lines = _evaluate(model, suite, args.out)
    results = summarize_answers(lines)
    figures = {
        "model": args.model, "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "seconds": round(time.perf_counter() - start, 1), "answers": len(lines),
        "results": results,
    }  # fmt: skip
    if args.out is not None:
        (args.out / "results.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
        write_report(args.out, results, lines)
    print(json.dumps(figures) if args.json else show_table(results))
    return 0


def _suite(args: Eval) -> Suite:
    suite = read_suite(args.suite)
    names = (
        "policies",
        "budgets",
        "tasks",
        "lengths",
        "protocols",
        "prompts",
        "rows",
        "page_size",
        "tags",
    )
    given = {name: getattr(args, name) for name in names if getattr(args, name) not in (None, ())}
    if args.data:
        tasks = task_names(args.data)
        given |= {"make": make_from_files(args.data, args.max_tokens), "tasks": tasks}
        given.setdefault("prompts", 10**9)
        given.setdefault("rows", 1)
        given.setdefault("page_size", 16)
    unknown = set(given.get("tasks", ())) - set(suite.tasks)
    if unknown and not args.data:
        raise InputError(f"no tasks {', '.join(unknown)}: use some of {', '.join(suite.tasks)}")
    for name in ("prompts", "rows", "page_size"):
        if given.get(name, 1) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more")
    return dataclasses.replace(suite, **given)


def _evaluate(model: Model, suite: Suite, folder: Path) -> list[dict[str, Any]]:
    with tqdm(unit="answer", disable=None, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return evaluate(model, suite, folder / "answers.jsonl", progress)
