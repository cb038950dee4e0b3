"""`kvjax batch`: answers a file of requests."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from tqdm import tqdm

from kvjax.infer.batch import BatchSummary, run_batch
from kvjax.infer.batch_form import read_requests
from kvjax.infer.batch_output import open_output
from kvjax.infer.commands.shared import ModelOptions, parse_arguments, warm_up
from kvjax.infer.compilations import CompilationCount
from kvjax.infer.llm import LLM

__all__ = ["Batch", "main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch(ModelOptions):
    """Answer a file of requests in the OpenAI batch form (one JSON object a line).

    Chats (/v1/chat/completions), completions (/v1/completions) and scores of given texts
    (/v1/score, whose body is {"prompt", "continuation"}). Each answer is appended to the output
    when it is finished. Run the same command again after an interruption: what is answered is kept,
    the rest is answered, failed requests are tried again.
    """

    input: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN.jsonl")]
    """Requests: {"custom_id", "method", "url", "body"} a line."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.jsonl")]
    """Answers: {"id", "custom_id", "response", "error"} a line, as they finish."""
    max_rows: int = 64
    """Requests that are answered at the same time."""
    optimistic: bool = False
    """Begin requests before it is sure that memory lasts for all of them; where it ends, the
    youngest wait and are computed again."""
    plan: Annotated[str, tyro.conf.arg(metavar="NAME")] = "multi"
    """How requests are planned. multi: the whole batch, all levels of what prompts share. exact:
    one level. lifting, naive: simpler rules for one level. These read what requests share once for
    all of them; the last bits of a result then depend on the others. sorted-lru: sorted, with a
    cache. fcfs-lru: in the file's order, with a cache. prefill-first: as SGLang. dual-scan: as
    BlendServe. none: in the file's order, nothing is shared. A body's "expected_tokens" helps to
    order a planned batch."""
    prefix: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A beginning that `LLM.save_prefix` saved: requests that share it do not compute it."""
    json: bool = False
    """End with one JSON object on stdout."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 if a request failed."""
    args = parse_arguments(Batch, "kvjax batch", argv)
    requests = read_requests(args.input)
    # What is wrong with the output is said before anything is loaded.
    with open_output(args.output, args.model) as output:
        rows = sum(request.params.n for request in requests)
        llm = args.load(min(args.max_rows, rows), optimistic=args.optimistic, plan=args.plan)
        if any(request.custom_id not in output.answered for request in requests):
            warm_up(llm)
        if args.prefix is not None:
            # Kept until a request needs the room, not held: what fits does not depend on it.
            llm.load_prefix(args.prefix).close()
        start = time.perf_counter()
        with (
            CompilationCount() as compiled,
            tqdm(total=len(requests), unit="request", disable=None) as bar,
        ):
            summary = run_batch(llm, requests, output, _show(bar, start))
    seconds = time.perf_counter() - start
    figures = _figures(llm, args.plan, summary, seconds, compiled.count)
    if args.json:
        print(json.dumps(figures))
    else:
        _report(args, summary, figures)
    return 1 if summary.failed else 0


def _show(bar: tqdm, start: float) -> Callable[[int, BatchSummary], None]:
    def progress(done: int, summary: BatchSummary) -> None:
        rate = summary.output_tokens / (time.perf_counter() - start)
        bar.set_postfix_str(f"{summary.failed} failed, {rate:.0f} tokens/s", refresh=False)
        bar.update(done - bar.n)

    return progress


def _figures(
    llm: LLM, plan: str, summary: BatchSummary, seconds: float, compiled: int
) -> dict[str, Any]:
    caches = [engine.cache for engine in llm.engines]
    planners = [engine.planner for engine in llm.engines]
    return {
        **dataclasses.asdict(summary),
        "plan": plan,
        "prefill_tokens_computed": sum(p.prefill_tokens_computed for p in planners),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(summary.output_tokens / seconds, 1),
        "kv_bytes": sum(cache.nbytes(jax.default_backend()) for cache in caches),
        "pages": sum(cache.num_pages for cache in caches),
        "peak_pages": sum(p.ledger.peak for p in planners),
        "preemptions": sum(p.preemptions for p in planners),
        "compilations_after_warmup": compiled,
    }


def _report(args: Batch, summary: BatchSummary, figures: dict[str, Any]) -> None:
    if summary.resumed == summary.requests:
        print(f"all {summary.requests} requests were answered before; delete {args.output} to redo")
        return
    answered = summary.requests - summary.failed
    resumed = f" ({summary.resumed} by an earlier run)" if summary.resumed else ""
    print(
        f"{answered} of {summary.requests} requests answered{resumed} in "
        f"{figures['seconds']:.1f} s, {figures['tokens_per_second']:.0f} tokens/s; of "
        f"{summary.prompt_tokens} prompt tokens {figures['prefill_tokens_computed']} were computed,"
        f" the others shared. See {args.output}"
    )
    if summary.failed:
        print(f"{summary.failed} failed: their lines say why", file=sys.stderr)
