"""`kvjax bench batch`: a planned batch beside servers' policies, in one engine, on a random model.

All policies run through the same compiled programs and differ only in their plans. Memory is capped
by the planner's ledger, not by another pool. What a perfect plan would need on the device is
computed beside it, from its rates.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any, cast

import jax
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh

from kvjax.cache import PageLedger
from kvjax.errors import InputError
from kvjax.infer.bench.roofline import Calls, Rates, perfect_seconds, work_of_call
from kvjax.infer.bench.workloads import Shape, micro
from kvjax.infer.commands.shared import parse_arguments
from kvjax.infer.compilations import CompilationCount
from kvjax.infer.engine import Engine
from kvjax.infer.planners import PLANNED, POLICIES, make_planner
from kvjax.models import Decoder, DecoderConfig
from kvjax.models.decoder import Rope
from kvjax.plan import FirstCome, Grid, Planned, Request, Sampled
from kvjax.sharding import param_shardings

__all__ = ["MODELS", "BenchBatch", "main", "random_engine", "random_model"]

MODELS = {
    "tiny": DecoderConfig(
        vocab_size=512, num_layers=2, embed_dim=64, mlp_dim=128, num_heads=4, num_kv_heads=2,
        head_dim=16, max_positions=4096,
    ),
    "8b": DecoderConfig(
        vocab_size=128_256, num_layers=32, embed_dim=4096, mlp_dim=14_336, num_heads=32,
        num_kv_heads=8, head_dim=128, max_positions=8192, rope=Rope(theta=500_000.0),
        dtype="bfloat16",
    ),
}  # fmt: skip

_SHAPE, _RATES = Shape(), Rates()
Answers = dict[int, list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchBatch:
    """Measure how fast a batch over shared documents is answered, by policy."""

    model: str = "tiny"
    """tiny: 2 layers of width 64. 8b: the shape of Llama-3.1-8B in bfloat16."""
    shape: Shape = _SHAPE
    """Of the requests."""
    outputs: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = ()
    """Tokens of the answers, dealt to the documents in turn; by default those of the shape."""
    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = (
        "exact", "sorted-lru", "fcfs-lru",
    )  # fmt: skip
    """See `kvjax batch --plan`. Those of servers begin requests before it is sure that memory
    lasts."""
    kv_tokens: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (110_000, 400_000)
    """Tokens that the cache may hold; every policy runs with each."""
    rows: int = 256
    """The most requests that run at a time."""
    token_buckets: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (
        512, 1024, 1536, 2048,
    )  # fmt: skip
    """Tokens of the compiled steps; the last is the budget."""
    row_buckets: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = ()
    """Rows of the compiled decoding steps beside `--rows`."""
    decode_steps: int = 8
    """The most steps of a call that only decodes."""
    page_size: int = 16
    """Tokens a page."""
    split_tokens: int = 1024
    """Tokens of a work item of the attention kernel."""
    rates: Rates = _RATES
    """What the device can do, for the figures beside it."""
    seed: int = 0
    """Of the prompts."""
    json: bool = False
    """End with one JSON object on stdout."""


class _Watch:
    """A planner that notes when each call came back and what it did."""

    def __init__(self, planner: FirstCome, model: DecoderConfig) -> None:
        self.planner = planner
        self.model = model
        self.calls = Calls()
        self.planning = 0.0
        self._last = time.perf_counter()

    @property
    def busy(self) -> bool:
        return self.planner.busy

    @property
    def ledger(self) -> PageLedger:
        return self.planner.ledger

    def plan(self) -> Planned | None:
        start = time.perf_counter()
        planned = self.planner.plan()
        self.planning += time.perf_counter() - start
        return planned

    def accept(self, planned: Planned, drawn: np.ndarray) -> list[Sampled]:
        now = time.perf_counter()
        work = work_of_call(planned, self.planner.grid, self.model)
        self.calls.add(planned.bucket.chunks, now - self._last, work)
        self._last = now
        return self.planner.accept(planned, drawn)


def build(args: BenchBatch) -> Engine:
    """The engine, its weights made on the device."""
    config = MODELS[args.model]
    longest = args.shape.shared + args.shape.own + max([args.shape.output, *args.outputs])
    grid = Grid(
        page_size=args.page_size, max_rows=args.rows, pages_per_row=-(-longest // args.page_size),
        row_buckets=tuple(sorted({*args.row_buckets, args.rows})),
        token_buckets=args.token_buckets, split_pages=max(1, args.split_tokens // args.page_size),
        decode_steps=args.decode_steps, shared_pages=max(1, 64 // args.page_size),
    )  # fmt: skip
    return random_engine(config, grid, max(args.kv_tokens) // args.page_size)


def random_engine(
    config: DecoderConfig, grid: Grid, num_pages: int, mesh: Mesh | None = None
) -> Engine:
    """An engine with random weights."""
    return Engine(*random_model(config, mesh), config, grid, num_pages, mesh=mesh, consume=True)


def random_model(
    config: DecoderConfig, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]:
    """`nnx.split` of a decoder with random weights, made on the devices that it is for."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    places = None if mesh is None else param_shardings(shapes, mesh)
    make = jax.jit(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0))), out_shardings=places)
    return graph, make()


def run_policy(
    args: BenchBatch, engine: Engine, policy: str, kv_tokens: int, requests: Sequence[Request]
) -> tuple[dict[str, Any], Answers]:
    """Answers all requests; figures of the run, and the tokens of each."""
    server = policy not in PLANNED
    ledger = PageLedger(kv_tokens // args.page_size)
    planner = make_planner(policy, engine.grid, ledger, optimistic=server)
    start = time.perf_counter()
    watch = _Watch(planner, engine.model)
    engine.planner = cast(FirstCome, watch)
    for request in requests:
        planner.add(request)
    answers: Answers = {request.id: [] for request in requests}
    with CompilationCount() as compiled:
        for outputs in engine.run():
            for output in outputs:
                answers[output.id].extend(output.tokens)
    seconds = time.perf_counter() - start
    drawn = sum(map(len, answers.values()))
    prompts = sum(len(request.prompt) for request in requests)
    figures = {
        "seconds": round(seconds, 3),
        "output_tokens_per_second": round(drawn / seconds, 1),
        "requests_per_second": round(len(requests) / seconds, 3),
        "prefill_tokens": planner.prefill_tokens_computed,
        "saved": round(1 - planner.prefill_tokens_computed / prompts, 4),
        "peak_pages": planner.ledger.peak,
        "preemptions": planner.preemptions,
        "planning_seconds": round(watch.planning, 3),
        "compilations": compiled.count,
        **watch.calls.figures(args.rates),
    }
    return figures, answers


def agreement(answers: Answers, others: Answers) -> dict[str, float]:
    """Which part of the answers is the same, and of their first tokens.

    Rounding depends on how work is cut. Where two tokens are about equally likely, as they often
    are to random weights, an answer may go another way from there on.
    """
    pairs = [(answers[i], others[i]) for i in answers]
    return {
        "first_tokens_equal": round(sum(a[:1] == b[:1] for a, b in pairs) / len(pairs), 4),
        "answers_equal": round(sum(a == b for a, b in pairs) / len(pairs), 4),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_arguments(BenchBatch, "kvjax bench batch", argv)
    for policy in args.policies:
        if policy not in POLICIES:
            raise InputError(f"no policy {policy!r}: use one of {', '.join(POLICIES)}")
    if args.model not in MODELS:
        raise InputError(f"no model {args.model!r}: use one of {', '.join(MODELS)}")
    _say(args, "making the model")
    start = time.perf_counter()
    engine = build(args)
    engine.warm_up(lambda done, total: _say(args, f"compiled {done} of {total}"))
    built = time.perf_counter() - start
    config, outputs = engine.model, args.outputs or (args.shape.output,)
    few = dataclasses.replace(args.shape, requests=min(args.shape.requests, args.shape.degree))
    warm = micro(few, outputs, args.seed + 1, config.vocab_size)
    run_policy(args, engine, "exact", max(args.kv_tokens), warm)
    requests = micro(args.shape, outputs, args.seed, config.vocab_size)
    best = perfect_seconds(requests, config, args.rates, budget=args.token_buckets[-1])
    results: dict[str, dict[str, Any]] = {}
    first: Answers = {}
    for kv_tokens in args.kv_tokens:
        for policy in args.policies:
            figures, answers = run_policy(args, engine, policy, kv_tokens, requests)
            first = first or answers
            figures |= agreement(answers, first)
            results.setdefault(str(kv_tokens), {})[policy] = figures
            _say(args, f"{kv_tokens} tokens of memory, {policy}: {json.dumps(figures)}")
    if args.json:
        print(json.dumps(_result(args, requests, built, best, results)))
    return 0


def _result(
    args: BenchBatch, requests: Sequence[Request], built: float, best: float,
    results: dict[str, dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": args.model,
        "requests": len(requests),
        "shape": dataclasses.asdict(args.shape),
        "outputs": args.outputs or (args.shape.output,),
        "rows": args.rows,
        "token_buckets": args.token_buckets,
        "build_and_compile_seconds": round(built, 1),
        "roofline_seconds": round(best, 3),
        "roofline_requests_per_second": round(len(requests) / best, 2),
        "kv_tokens": results,
        "ratios": {
            tokens: {
                policy: round(
                    some[args.policies[0]]["output_tokens_per_second"]
                    / figures["output_tokens_per_second"],
                    3,
                )
                for policy, figures in some.items()
            }
            for tokens, some in results.items()
        },
    }


def _say(args: BenchBatch, what: str) -> None:
    print(what, file=sys.stderr if args.json else sys.stdout, flush=True)
