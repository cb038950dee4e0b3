"""`kvjax bench generate`: our tokens a second beside a peer's, in one process, on one model.

The model is random, of a given shape, written as a Hugging Face folder that both sides read. Two
workloads: `equal`, requests of one length, where a padded batch wastes nothing; and `ragged`,
prompts and answers of many lengths, where it does. Both sides answer greedily and ignore end
tokens; every repetition has fresh prompts, so that no cache of ours helps; medians are of warm
repetitions.
"""

import dataclasses
import gc
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from flax import nnx

from kvjax.errors import InputError
from kvjax.infer.bench.idle import busy_and_span, device_times
from kvjax.infer.commands.shared import parse_arguments, warm_up
from kvjax.infer.compilations import CompilationCount
from kvjax.infer.engine import Engine
from kvjax.infer.llm import LLM
from kvjax.infer.sampling import SamplingParams
from kvjax.models import Decoder, DecoderConfig, hf
from kvjax.plan import Request

__all__ = ["BenchGenerate", "Workload", "main", "workloads"]

SHAPES = {
    "small": DecoderConfig(
        vocab_size=512, num_layers=8, embed_dim=512, mlp_dim=1408, num_heads=8, num_kv_heads=4,
        head_dim=64, max_positions=1024,
    ),
    "1b": DecoderConfig(
        vocab_size=128_256, num_layers=16, embed_dim=2048, mlp_dim=8192, num_heads=32,
        num_kv_heads=8, head_dim=64, max_positions=1024, tie_embeddings=True, dtype="bfloat16",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchGenerate:
    """Measure `generate` beside a peer on a random model of a given shape."""

    shape: Literal["small", "1b"] = "small"
    """small: 8 layers of width 512, float32. 1b: 16 layers of width 2048, bfloat16."""
    peer: Literal["transformers", "none"] = "transformers"
    """Whose batched `generate` is measured on the same prompts."""
    equal: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (16,)
    """How many requests of 256 tokens, with 64 to generate, at a time."""
    ragged: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (32,)
    """How many requests of 64 to 512 tokens, with 8 to 128 to generate, at a time."""
    repetitions: int = 3
    """Of each measurement, after one that warms up."""
    token_budget: int | None = None
    """See LLM.load."""
    profile: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Also profile our decoding steps, write the profiles there and say how long the device waits;
    needs an accelerator."""
    json: bool = False
    """End with one JSON object on stdout."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests: their prompts' token ids, and how many tokens each is to get."""

    name: str
    prompts: list[list[int]]
    outputs: list[int]


def workloads(args: BenchGenerate, vocab_size: int, seed: int) -> Iterator[Workload]:
    """What is measured, with prompts that depend on the seed; lengths do not."""
    words = np.random.default_rng(seed)
    for n in args.equal:
        lengths, outputs = np.full(n, 256), [64] * n
        yield _workload(f"equal-{n}", words, vocab_size, lengths, outputs)
    for n in args.ragged:
        sizes = np.random.default_rng(n)
        lengths, outputs = sizes.integers(64, 513, n), sizes.integers(8, 129, n).tolist()
        yield _workload(f"ragged-{n}", words, vocab_size, lengths, outputs)


def _workload(
    name: str, words: np.random.Generator, vocab_size: int, lengths: np.ndarray, outputs: list[int]
) -> Workload:
    prompts = [words.integers(0, vocab_size, length).tolist() for length in lengths]
    return Workload(name, prompts, outputs)


Generate = Callable[[Workload], list[Sequence[int]]]


def _ours(args: BenchGenerate, folder: Path) -> tuple[Generate, LLM]:
    rows = max((*args.equal, *args.ragged))
    llm = LLM.load(folder, max_rows=rows, max_length=640, token_budget=args.token_budget)
    warm_up(llm)

    def generate(work: Workload) -> list[Sequence[int]]:
        params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in work.outputs]
        return [answer.token_ids for answer in llm.generate(work.prompts, params)]

    return generate, llm


def _transformers(folder: Path) -> Generate:
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise InputError(f"the peer needs PyTorch and transformers ({e}): install them") from e
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    transformers.utils.logging.disable_progress_bar()
    # Any: its own stubs do not say what it returns.
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.to(device)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    model.eval()

    def generate(work: Workload) -> list[Sequence[int]]:
        longest, most = max(map(len, work.prompts)), max(work.outputs)
        ids = torch.zeros((len(work.prompts), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(work.prompts):  # padded on the left, as its authors advise
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            out = model.generate(
                ids.to(device), attention_mask=mask.to(device), do_sample=False,
                max_new_tokens=most, min_new_tokens=most, pad_token_id=0,
            )  # fmt: skip
        answers = out[:, longest:].cpu().numpy()
        return [row[:n].tolist() for row, n in zip(answers, work.outputs, strict=True)]

    return generate


def _measure(
    args: BenchGenerate, vocab_size: int, generate: Generate, side: str
) -> dict[str, dict[str, Any]]:
    """Seconds of every repetition of every workload, and the first repetition's answers."""
    results: dict[str, dict[str, Any]] = {}
    for seed in range(args.repetitions + 1):
        for work in workloads(args, vocab_size, seed):
            start = time.perf_counter()
            answers = generate(work)
            seconds = time.perf_counter() - start
            if not seed:  # warms up
                results[work.name] = {"tokens": sum(work.outputs), "answers": answers, "s": []}
            else:
                results[work.name]["s"].append(seconds)
            print(f"{side} {work.name}: {seconds:.3f} s", file=sys.stderr)
    return results


def _profile(engine: Engine, work: Workload, folder: Path) -> dict[str, float]:
    """Profiles decoding steps in the middle of a workload of equal requests."""
    for i, (prompt, n) in enumerate(zip(work.prompts, work.outputs, strict=True)):
        engine.planner.add(Request(id=i, prompt=tuple(prompt), max_tokens=n))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host, for which the device waits
    rows, drawn, begin, end = len(work.prompts), 0, 0, 0
    for outputs in engine.run():
        drawn += sum(len(output.tokens) for output in outputs)
        if not begin and drawn >= 16 * rows:
            jax.profiler.start_trace(str(folder), profiler_options=options)
            begin = drawn
        elif begin and not end and drawn >= 48 * rows:
            jax.profiler.stop_trace()
            end = drawn
    busy, span = busy_and_span(device_times(folder))
    steps = (end - begin) / rows
    return {"step_ms": round(span / steps / 1e3, 3), "device_idle": round(1 - busy / span, 4)}


def _figures(ours: dict[str, Any], peer: dict[str, Any] | None) -> dict[str, Any]:
    rate = ours["tokens"] / statistics.median(ours["s"])
    figures = {"tokens_per_second": round(rate, 1), "seconds": [round(s, 4) for s in ours["s"]]}
    if peer is not None:
        other = peer["tokens"] / statistics.median(peer["s"])
        pairs = list(zip(ours["answers"], peer["answers"], strict=True))
        figures |= {
            "peer_tokens_per_second": round(other, 1),
            "peer_seconds": [round(s, 4) for s in peer["s"]],
            "ratio": round(rate / other, 3),
            "answers_equal": sum(list(a) == list(b) for a, b in pairs) / len(pairs),
        }
    return figures


def _save_random(folder: Path, config: DecoderConfig) -> None:
    """A folder that every library can read, with random weights."""

    @jax.jit
    def init() -> Any:
        return nnx.state(Decoder(config, rngs=nnx.Rngs(0)))

    hf.save(folder, config, init(), dtype=config.dtype)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_arguments(BenchGenerate, "kvjax bench generate", argv)
    config = SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _save_random(folder, config)
        # The peer first: what it leaves on the device is freed, ours is taken to the last.
        peer: dict[str, Any] = {}
        if args.peer != "none":
            peer = _measure(args, config.vocab_size, _transformers(folder), args.peer)
            gc.collect()
            if jax.default_backend() == "gpu":
                import torch  # pyright: ignore[reportMissingImports]

                torch.cuda.empty_cache()
        generate, llm = _ours(args, folder)
    with CompilationCount() as compiled:
        ours = _measure(args, config.vocab_size, generate, "ours")
    profiles = {
        work.name: _profile(llm.engine, work, args.profile / work.name)
        for work in workloads(args, config.vocab_size, seed=args.repetitions + 1)
        if args.profile and work.name.startswith("equal")
    }
    result = {
        "device": jax.devices()[0].device_kind,
        "shape": args.shape,
        "dtype": config.dtype,
        "token_budget": llm.engine.grid.token_buckets[-1],
        "peer": args.peer,
        "versions": _versions(),
        "compilations_after_warmup": compiled.count,
        "workloads": {name: _figures(ours[name], peer.get(name)) for name in ours},
        "decoding": profiles,
    }
    _report(args, result)
    return 0


def _versions() -> dict[str, str]:
    found = {}
    for package in ("kvjax", "jax", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "-"
    return found


def _report(args: BenchGenerate, result: dict[str, Any]) -> None:
    for name, figures in result["workloads"].items():
        line = f"{name}: {figures['tokens_per_second']:.0f} tokens/s"
        if "ratio" in figures:
            line += (
                f", {args.peer} {figures['peer_tokens_per_second']:.0f}: {figures['ratio']:.2f} x; "
                f"{figures['answers_equal']:.0%} of the answers equal"
            )
        print(line, file=sys.stderr if args.json else sys.stdout)
    for name, figures in result["decoding"].items():
        print(
            f"{name}: a decoding step of {figures['step_ms']} ms, in which the device waits "
            f"{figures['device_idle']:.1%} of the time",
            file=sys.stderr if args.json else sys.stdout,
        )
    if args.json:
        print(json.dumps(result))
