"""`kvjax bench batch-sim`: what planning a batch is worth, counted without a model.

The planners of the engine plan every call of a workload; nothing is computed. Counted are calls of
one step, tokens, and pages; seconds are a model of an accelerator, not a measurement.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import tyro

from kvjax.cache import PageLedger
from kvjax.errors import InputError
from kvjax.infer.bench.workloads import WORKLOADS, Shape, make_workload
from kvjax.infer.commands.shared import parse_arguments
from kvjax.infer.planners import PLANNED, POLICIES, make_planner
from kvjax.plan import FirstCome, Grid, Request

__all__ = ["Accelerator", "BenchBatchSim", "Counts", "main", "simulate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A roofline, by default of an 8-billion-parameter model in bfloat16 on an A100.

    Attributes:
        weight_bytes: read once a step.
        flops_per_token: of the matrix products with the weights.
        kv_bytes_per_token: read for every token in the cache.
        bytes_per_second, flops_per_second: what the device can do.
        overhead: seconds a step.
    """

    weight_bytes: float = 16e9
    flops_per_token: float = 16e9
    kv_bytes_per_token: float = 131_072
    bytes_per_second: float = 1.6e12
    flops_per_second: float = 187e12
    overhead: float = 5e-3

    def seconds(self, tokens: int, kv_tokens: int) -> float:
        """Of a step that computes `tokens` and reads `kv_tokens` from the cache."""
        compute = tokens * self.flops_per_token / self.flops_per_second
        weights = self.weight_bytes / self.bytes_per_second
        kv = kv_tokens * self.kv_bytes_per_token / self.bytes_per_second
        return self.overhead + max(weights, compute) + kv


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What a policy did with a workload.

    Attributes:
        steps: calls, of one step each.
        prompt_tokens, output_tokens: of all requests.
        prefill_tokens: of prompts, computed; what was thrown out counts again.
        saved: part of the prompt tokens that was not computed.
        mean_tokens: a step.
        below_half: part of the steps with less than half of the token budget.
        peak_pages: held at once.
        preemptions: rows thrown out.
        least_steps: that the tokens computed need, if every step were full.
        modelled_seconds: if every row reads its own keys and values.
        modelled_seconds_grouped: if pages that rows share are read once a step.
        planning_seconds: that our planner took, on this machine.
    """

    steps: int
    prompt_tokens: int
    output_tokens: int
    prefill_tokens: int
    saved: float
    mean_tokens: float
    below_half: float
    peak_pages: int
    preemptions: int
    least_steps: int
    modelled_seconds: float
    modelled_seconds_grouped: float
    planning_seconds: float


def simulate(
    planner: FirstCome, requests: Sequence[Request], device: Accelerator | None = None
) -> Counts:
    """Runs a planner dry; every request draws all its tokens.

    Args:
        planner: with a grid of one decoding step a call.
        requests: added in this order, all before the first call.
        device: of the modelled seconds.

    Raises:
        RuntimeError: the planner cannot go on, which is a fault of it.
    """
    device, budget = device or Accelerator(), planner.grid.token_buckets[-1]
    start = time.perf_counter()
    for request in requests:
        planner.add(request)
    sizes: list[int] = []
    seconds = grouped = 0.0
    while planner.busy:
        planned = planner.plan()
        if planned is None:
            raise RuntimeError(f"{planner.ledger.held} pages are held and nothing can be planned")
        tokens = int(np.count_nonzero(planned.step.row < planner.grid.max_rows))
        lengths = sum(entry.row.length for entry in planned.entries)
        sizes.append(tokens)
        seconds += device.seconds(tokens, lengths)
        shared = planner.ledger.held * planner.grid.page_size
        grouped += device.seconds(tokens, min(lengths, shared))
        planner.accept(planned, np.zeros((planned.bucket.steps, planned.bucket.rows), np.int32))
    prompts = sum(len(request.prompt) for request in requests)
    outputs = sum(request.max_tokens for request in requests)
    steps = np.array(sizes)
    return Counts(
        steps=len(sizes),
        prompt_tokens=prompts,
        output_tokens=outputs,
        prefill_tokens=planner.prefill_tokens_computed,
        saved=1 - planner.prefill_tokens_computed / prompts,
        mean_tokens=float(steps.mean()),
        below_half=float(np.mean(steps < budget / 2)),
        peak_pages=planner.ledger.peak,
        preemptions=planner.preemptions,
        least_steps=-(-int(steps.sum()) // budget),
        modelled_seconds=seconds,
        modelled_seconds_grouped=grouped,
        planning_seconds=time.perf_counter() - start,
    )


_SHAPE = Shape()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchBatchSim:
    """Count what policies do with a batch, without a model."""

    workload: Annotated[str, tyro.conf.arg(metavar="NAME")] = "w1"
    """w1: equal requests over shared documents. w2: search snippets. w3: short and long answers.
    w4: several levels. w5: nothing shared."""
    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = (
        "none", "fcfs-lru", "sorted-lru", "exact",
    )  # fmt: skip
    """none, fcfs-lru, sorted-lru, prefill-first, dual-scan, naive, lifting, exact, multi. The first
    five run at most `--peer-rows` requests at a time, as servers do; the others as many as memory
    feeds."""
    shape: Shape = _SHAPE
    """Of the requests."""
    scale: int = 1
    """Divide the requests, their tokens, the budget and the rows by it."""
    kv_tokens: int = 440_000
    """Tokens that fit in the KV memory, not scaled."""
    budget: int = 2048
    """Tokens a step."""
    page_size: int = 16
    """Tokens a page."""
    peer_rows: int = 256
    """The most requests that run at a time under a server's policy."""
    rows: int | None = None
    """The same for the others; by default as many as a step has tokens."""
    by_ratio: bool = True
    """Groups with much to draw go first; otherwise they go as they come."""
    optimistic: bool = False
    """Also the planned policies begin requests before it is sure that memory lasts."""
    seed: int = 0
    """Of the workload."""
    json: bool = False
    """End with one JSON object on stdout."""


def run_policy(args: BenchBatchSim, policy: str, requests: Sequence[Request]) -> Counts:
    """Simulates one policy."""
    budget = max(1, args.budget // args.scale)
    planned = policy in PLANNED
    rows = args.rows or budget if planned else max(1, args.peer_rows // args.scale)
    longest = max(len(request.prompt) + request.max_tokens for request in requests)
    grid = Grid(
        page_size=args.page_size, max_rows=rows, pages_per_row=-(-longest // args.page_size),
        row_buckets=(rows,), token_buckets=(max(budget, rows),), decode_steps=1,
    )  # fmt: skip
    planner = make_planner(
        policy, grid, PageLedger(args.kv_tokens // args.page_size), by_ratio=args.by_ratio,
        optimistic=args.optimistic or not planned,
    )  # fmt: skip
    return simulate(planner, requests)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_arguments(BenchBatchSim, "kvjax bench batch-sim", argv)
    for policy in args.policies:
        if policy not in POLICIES:
            raise InputError(f"no policy {policy!r}: use one of {', '.join(POLICIES)}")
    shape = args.shape.scaled(args.scale) if args.scale > 1 else args.shape
    requests = make_workload(args.workload, shape, args.seed)
    results: dict[str, dict[str, Any]] = {}
    for policy in args.policies:
        counts = run_policy(args, policy, requests)
        results[policy] = dataclasses.asdict(counts)
        print(_line(policy, counts), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(
            json.dumps(
                {
                    "workload": args.workload,
                    "about": WORKLOADS[args.workload],
                    "requests": len(requests),
                    "kv_tokens": args.kv_tokens,
                    "budget": args.budget // args.scale,
                    "policies": results,
                }
            )
        )
    return 0


def _line(policy: str, counts: Counts) -> str:
    return (
        f"{policy:<14} {counts.steps:>6} steps, {counts.saved:6.1%} of the prompts saved, "
        f"{counts.mean_tokens:6.0f} tokens a step, {counts.below_half:4.0%} below half, "
        f"{counts.peak_pages} pages, {counts.preemptions} preemptions, modelled "
        f"{counts.modelled_seconds:.0f} s ({counts.modelled_seconds_grouped:.0f} s grouped)"
    )
