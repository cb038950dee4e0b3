"""`kvjax batch`: answers a file of requests."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from kvjax.infer.batch import BatchSummary, answered_ids, read_requests, run_batch
from kvjax.infer.commands.shared import ModelOptions, parse_arguments, warm_up
from kvjax.infer.compilations import CompilationCount
from kvjax.infer.llm import LLM

__all__ = ["Batch", "main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch(ModelOptions):
    """Answer a file of requests in the OpenAI batch form (one JSON object a line).

    Each answer is appended to the output when it is finished. Run the same command again after an
    interruption: what is answered is kept, the rest is answered.
    """

    input: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN.jsonl")]
    """Requests: {"custom_id", "method", "url", "body"} a line."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.jsonl")]
    """Answers: {"id", "custom_id", "response", "error"} a line, as they finish."""
    max_rows: int = 64
    """Requests that are answered at the same time."""
    json: bool = False
    """End with one JSON object on stdout."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 if a request failed."""
    args = parse_arguments(Batch, "kvjax batch", argv)
    requests = read_requests(args.input)
    answered = answered_ids(args.output, args.model)  # a bad file is said before anything is loaded
    llm = args.load(min(args.max_rows, len(requests)))
    if any(request.custom_id not in answered for request in requests):
        warm_up(llm)
    start = time.perf_counter()
    with (
        CompilationCount() as compiled,
        tqdm(total=len(requests), unit="request", disable=None) as bar,
    ):

        def progress(done: int, failed: int) -> None:
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(done - bar.n)

        summary = run_batch(
            llm, requests, args.output, model=args.model, answered=answered, progress=progress
        )
    seconds = time.perf_counter() - start
    _report(args, llm, summary, seconds, compiled.count)
    return 1 if summary.failed else 0


def _report(args: Batch, llm: LLM, summary: BatchSummary, seconds: float, compiled: int) -> None:
    planner = llm.engine.planner
    figures = {
        **dataclasses.asdict(summary),
        "prefill_tokens_computed": planner.prefill_tokens_computed,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(summary.output_tokens / seconds, 1),
        "peak_pages": planner.ledger.peak,
        "compilations_after_warmup": compiled,
    }
    if args.json:
        print(json.dumps(figures))
        return
    if summary.resumed == summary.requests:
        print(f"all {summary.requests} requests were answered before; delete {args.output} to redo")
        return
    answered = summary.requests - summary.failed
    resumed = f" ({summary.resumed} by an earlier run)" if summary.resumed else ""
    print(
        f"{answered} of {summary.requests} requests answered{resumed} in {seconds:.1f} s, "
        f"{figures['tokens_per_second']:.0f} tokens/s; of {summary.prompt_tokens} prompt tokens "
        f"{planner.prefill_tokens_computed} were computed, the others shared. See {args.output}"
    )
    if summary.failed:
        print(f"{summary.failed} failed: their lines say why", file=sys.stderr)
