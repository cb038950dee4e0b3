"""`kvjax bench scale`: what more devices are worth, on a random model.

Twice: copies of the model that share a batch (`data`), and one model over several devices
(`model`), which decodes rows of long prompts.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from kvjax.cache import PageLedger
from kvjax.errors import InputError
from kvjax.infer.bench.batch import MODELS, random_engine
from kvjax.infer.bench.workloads import Shape, micro
from kvjax.infer.commands.shared import parse_arguments, parse_mesh
from kvjax.infer.engine import Engine
from kvjax.infer.planners import make_planner
from kvjax.infer.replicas import deal, replica_meshes, run_all
from kvjax.infer.sizes import choose_grid
from kvjax.plan import Request

__all__ = ["BenchScale", "batch_rate", "decode_step", "main"]

_SHAPE = Shape(requests=400)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchScale:
    """Measure what more devices are worth."""

    model: str = "8b"
    """8b: the shape of Llama-3.1-8B in bfloat16. tiny: 2 layers of width 64."""
    devices: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (1, 2)
    """How many; the first is what the others are compared with."""
    shape: Shape = _SHAPE
    """Of the batch's requests."""
    rows: int = 256
    """The most of them that a copy of the model runs at a time."""
    kv_tokens: int = 110_000
    """Tokens that the cache of a copy holds."""
    token_budget: int = 2048
    """Tokens a step."""
    decode_rows: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (1, 64)
    """Rows that decode at a time."""
    prompt: int = 8192
    """Tokens of their prompts."""
    output: int = 64
    """Tokens that they draw."""
    page_size: int = 16
    """Tokens a page."""
    json: bool = False
    """End with one JSON object on stdout."""


def batch_rate(args: BenchScale, copies: int) -> dict[str, float]:
    """Requests a second of a planned batch, dealt to copies of the model."""
    config = MODELS[args.model]
    longest = args.shape.shared + args.shape.own + args.shape.output
    engines = _engines(args, f"data={copies}", longest, args.rows, args.kv_tokens)
    few = dataclasses.replace(args.shape, requests=args.shape.degree * copies)
    _answer(engines, micro(few, [args.shape.output], 1, config.vocab_size))  # warms up
    requests = micro(args.shape, [args.shape.output], 0, config.vocab_size)
    seconds, loads = _answer(engines, requests)
    return {
        "requests_per_second": round(len(requests) / seconds, 3),
        "seconds": round(seconds, 3),
        "most_over_mean_load": round(max(loads) / float(np.mean(loads)), 4),
    }


def decode_step(args: BenchScale, parts: int, rows: int) -> float:
    """Seconds of a decoding step of `rows` rows, the model over `parts` devices."""
    kv_tokens = rows * (args.prompt + args.output + args.page_size)
    longest = args.prompt + args.output
    (engine,) = _engines(args, f"model={parts}", longest, rows, kv_tokens)
    words = np.random.default_rng(0)
    vocabulary = engine.model.vocab_size
    for i in range(rows):
        prompt = tuple(words.integers(0, vocabulary, args.prompt).tolist())
        engine.planner.add(Request(id=i, prompt=prompt, max_tokens=args.output))
    drawn, begin, before = np.zeros(rows, int), 0.0, 0
    for outputs in engine.run():
        for output in outputs:
            drawn[output.id] += len(output.tokens)
        if not begin and drawn.min() > 0:  # from here on all rows decode
            begin, before = time.perf_counter(), int(drawn.sum())
    return (time.perf_counter() - begin) / (int(drawn.sum()) - before) * rows


def _engines(
    args: BenchScale, axes: str, longest: int, rows: int, kv_tokens: int
) -> list[Engine]:  # fmt: skip
    mesh: Mesh = parse_mesh(axes)
    grid = choose_grid(longest, rows, args.page_size, args.token_budget, 8, shared=True)
    pages = -(-kv_tokens // args.page_size)
    engines = [
        random_engine(MODELS[args.model], grid, pages, mesh=part) for part in replica_meshes(mesh)
    ]
    for engine in engines:
        engine.warm_up()
    return engines


def _answer(engines: list[Engine], requests: list[Request]) -> tuple[float, list[int]]:
    """Seconds until all are answered, and the tokens that each engine was dealt."""
    start = time.perf_counter()
    hands = deal(requests, engines[0].grid.page_size, len(engines))
    for engine, hand in zip(engines, hands, strict=True):
        engine.planner = make_planner("exact", engine.grid, PageLedger(engine.cache.num_pages))
        for i in hand:
            engine.planner.add(requests[i])
    drawn = sum(len(output.tokens) for outputs in run_all(engines) for output in outputs)
    assert drawn == sum(request.max_tokens for request in requests)
    seconds = time.perf_counter() - start
    loads = [e.planner.prefill_tokens_computed for e in engines]
    draws = [sum(requests[i].max_tokens for i in hand) for hand in hands]
    return seconds, [a + b for a, b in zip(loads, draws, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_arguments(BenchScale, "kvjax bench scale", argv)
    if args.model not in MODELS:
        raise InputError(f"no model {args.model!r}: use one of {', '.join(MODELS)}")
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    batch = result["batch"] = {}
    for count in args.devices:
        batch[count] = batch_rate(args, count)
        _say(args, f"batch, {count} copies: {json.dumps(batch[count])}")
    steps = result["decode_step_seconds"] = {}
    for rows in args.decode_rows:
        for count in args.devices:
            step = decode_step(args, count, rows)
            steps.setdefault(rows, {})[count] = round(step, 6)
            _say(args, f"a step of {rows} rows over {count} devices: {step * 1e3:.3f} ms")
    first = args.devices[0]
    rates = {count: x["requests_per_second"] for count, x in batch.items()}
    result["batch_speedup"] = {count: round(x / rates[first], 3) for count, x in rates.items()}
    result["decode_speedup"] = {
        rows: {count: round(x[first] / s, 3) for count, s in x.items()} for rows, x in steps.items()
    }
    if args.json:
        print(json.dumps(result))
    return 0


def _say(args: BenchScale, what: str) -> None:
    print(what, file=sys.stderr if args.json else sys.stdout, flush=True)
