"""`kvjax bench video`: seconds a chunk with the cache, and with the methods that recompute.

Weights and frames are random: the time does not depend on them. Beside each time stands what the
arithmetic of the method asks for, and beside each speed-up the ratio of those, its bound.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from kvjax.diffusion import Sampler
from kvjax.errors import InputError
from kvjax.infer.commands.shared import parse_arguments
from kvjax.models.video_config import VIDEO_DIT_SIZES, VideoDiTConfig
from kvjax.models.video_dit import VideoDiT
from kvjax.models.video_rollout import (
    Rollout,
    SplitVideoModel,
    next_chunk,
    split_video_model,
    start,
)

__all__ = [
    "BenchVideo",
    "VideoTiming",
    "chunk_macs",
    "clip_macs",
    "main",
    "random_model",
    "time_method",
]

Array = jax.Array
# The fastest bfloat16 matrix product measured; the data sheet's 989e12 is not reached.
_PEAK = {"NVIDIA H200": 783e12, "NVIDIA H100": 783e12}
BASELINES = ("os-ext", "os-fix")
PEERS = ("none", "torch", "torch-compile")


def clip_macs(config: VideoDiTConfig, frames: int, keys: int, prefix: str | None = None) -> int:
    """Multiply-adds of one call of the network without text.

    Args:
        config: of the model.
        frames: that go through the layers.
        keys: frames that each sees in time, cached ones included; masks save nothing.
        prefix: None: no attention to clean frames. "released": as the authors count, with a layer
            of its own that projects four times. "read": our way, whose noisy frames need no keys.
    """
    e, places = config.embed_dim, config.num_places
    layer = (8 + 2 * config.mlp_ratio) * e * e + 2 * e * (places + keys)
    if prefix and config.prefix_attention == "code":
        layer += (4 if prefix == "released" else 2) * e * e
    if prefix and config.prefix_attention != "none":
        layer += 2 * e * places * config.prefix_frames
    ends = config.patch**2 * e * (config.channels + config.out_channels)
    return frames * places * (config.num_layers * layer + ends)


def chunk_macs(
    config: VideoDiTConfig, method: str, number: int, steps: int, *, released: bool = False
) -> int:
    """Multiply-adds of one row's chunk with all its denoising calls.

    `released` counts as the paper does: its layers, and no cache write.
    """
    chunk, before = config.chunk, min(1 + number * config.chunk, config.max_prefix)
    if method != "ca2":
        frames = chunk + (chunk if method == "os-fix" else before)
        return steps * clip_macs(config, frames, frames)
    if released:
        return steps * clip_macs(config, chunk, before + chunk, "released")
    call = clip_macs(config, chunk, before + chunk, "read")
    return steps * call + clip_macs(config, chunk, before + chunk, "released")


@dataclasses.dataclass(frozen=True)
class VideoTiming:
    """What one method took.

    Attributes:
        method: "ca2", "os-ext" or "os-fix".
        prefix_attention: of the model.
        rows: videos at a time.
        seconds: of each chunk.
        teramacs: multiply-adds of each chunk, all rows, in 10^12.
        released_teramacs: the same as the paper counts them.
        call_ms: of a denoising call in the later half of the chunks, with its share of the rest.
        first_seconds: of the first chunks, one of each length, with what they compile.
        utilisation: of the arithmetic that the device can do; None where that is not known.
        cache_bytes: of the frame ring; 0 without.
    """

    method: str
    prefix_attention: str
    rows: int
    seconds: tuple[float, ...]
    teramacs: tuple[float, ...]
    released_teramacs: tuple[float, ...]
    call_ms: float
    first_seconds: float
    utilisation: float | None
    cache_bytes: int


def random_model(config: VideoDiTConfig) -> SplitVideoModel:
    """Random weights, made on the device one kind after the other and never twice."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: VideoDiT(config, rngs=nnx.Rngs(0))))
    leaves, structure = jax.tree.flatten(shapes)
    made = [
        0.02 * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return split_video_model(nnx.merge(graph, jax.tree.unflatten(structure, made)), consume=True)


def time_method(
    model: SplitVideoModel, method: str, *, rows: int, chunks: int, sampler: Sampler
) -> VideoTiming:
    """Times every chunk of a rollout, after one whose programs are compiled.

    Args:
        model: with a bidirectional temporal attention for the methods that recompute.
        method: "ca2", "os-ext" or "os-fix".
        rows: videos at a time.
        chunks: how many are timed.
        sampler: with its steps.
    """
    config, options = model.config, Rollout(method=method, sampler=sampler)
    shape = (rows, 1, config.height, config.width, config.channels)
    frames, keys = jnp.zeros(shape), jax.random.split(jax.random.key(0), rows)
    lengths = 1 + -(-(config.max_prefix - 1) // config.chunk) if method == "os-ext" else 1

    def run(count: int) -> list[float]:
        state, seconds = start(model, frames, keys, options), []
        jax.block_until_ready(state)
        for _ in range(count):
            begin = time.perf_counter()
            state, chunk = next_chunk(model, state, options)
            jax.block_until_ready((state, chunk))
            seconds.append(time.perf_counter() - begin)
        return seconds

    begin = time.perf_counter()
    run(min(lengths, chunks))
    first = time.perf_counter() - begin
    seconds = run(chunks)
    ours, released = (
        [rows * chunk_macs(config, method, i, sampler.steps, released=x) for i in range(chunks)]
        for x in (False, True)
    )
    ring = config.ring(rows).nbytes(jax.default_backend()) if method == "ca2" else 0
    kind = jax.devices()[0].device_kind
    peak = next((flops for name, flops in _PEAK.items() if kind.startswith(name)), None)
    return VideoTiming(
        method=method,
        prefix_attention=config.prefix_attention,
        rows=rows,
        seconds=tuple(seconds),
        teramacs=tuple(macs / 1e12 for macs in ours),
        released_teramacs=tuple(macs / 1e12 for macs in released),
        call_ms=1e3
        * float(np.median(seconds[chunks // 2 :]))
        / (sampler.steps + (method == "ca2")),
        first_seconds=first,
        utilisation=None if peak is None else 2 * sum(ours) / sum(seconds) / peak,
        cache_bytes=ring,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchVideo:
    """Time a video model chunk by chunk: with its cache, and with methods that recompute."""

    model: Annotated[str, tyro.conf.arg(metavar="NAME")] = "XL/2"
    """XL/2, B/2 or tiny."""
    dtype: Annotated[str, tyro.conf.arg(metavar="TYPE")] = "bfloat16"
    """bfloat16 or float32."""
    rows: int = 1
    """Videos at a time."""
    frames: int = 80
    """New frames."""
    steps: int = 100
    """Denoising calls a chunk."""
    chunk: int = 8
    """Frames a chunk."""
    max_prefix: int = 25
    """Frames that the cache holds, and that os-ext computes again."""
    variants: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("code", "none")
    """Prefix attentions of ca2 to time: paper, code, none. The others have none, as theirs had."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("ca2", *BASELINES)
    """ca2, os-ext, os-fix."""
    peer: Annotated[str, tyro.conf.arg(metavar="NAME")] = "none"
    """torch: the same network in PyTorch is timed too, one call behind a full cache, as its authors
    run it; torch-compile: the same, compiled; none."""
    json: bool = False
    """End with one JSON object on stdout."""

    def config(self, method: str, variant: str) -> VideoDiTConfig:
        """The model of a method; os-ext and os-fix look both ways and have no prefix attention."""
        if self.model not in VIDEO_DIT_SIZES:
            raise InputError(f"no model {self.model!r}: use one of {', '.join(VIDEO_DIT_SIZES)}")
        config = dataclasses.replace(
            VIDEO_DIT_SIZES[self.model], dtype=self.dtype, chunk=self.chunk,
            max_prefix=self.max_prefix, prefix_attention=variant,
        )  # fmt: skip
        if method == "ca2":
            return config
        return dataclasses.replace(config, prefix_attention="none", temporal="full")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0."""
    args = parse_arguments(BenchVideo, "kvjax bench video", argv)
    if args.frames % args.chunk or args.frames < args.chunk:
        raise InputError(f"{args.frames} frames are no whole chunks of {args.chunk}")
    if wrong := sorted(set(args.methods) - {"ca2", *BASELINES}):
        raise InputError(f"no method {wrong[0]!r}: use ca2, os-ext or os-fix")
    if args.peer not in PEERS:
        raise InputError(f"no peer {args.peer!r}: use {', '.join(PEERS)}")
    cases = [("ca2", variant) for variant in args.variants if "ca2" in args.methods]
    cases += [(method, "none") for method in BASELINES if method in args.methods]
    show = functools.partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    peers = [_peer(args, variant) for m, variant in cases if m == "ca2" and args.peer != "none"]
    for peer in peers:  # first: they give their memory back when their processes end
        show(f"{peer['framework']}, {peer['prefix_attention']}: {peer['call_ms']:.2f} ms a call")
    timings = []
    for method, variant in cases:
        model = random_model(args.config(method, variant))
        timings.append(
            time_method(
                model, method, rows=args.rows, chunks=args.frames // args.chunk,
                sampler=Sampler(steps=args.steps),
            )
        )  # fmt: skip
        show(_line(timings[-1]))
    ratios = _ratios(timings)
    for ratio in ratios:
        show(_ratio_line(ratio))
    for peer in peers:
        peer["ratio"] = peer["call_ms"] / next(
            timing.call_ms for timing in timings
            if (timing.method, timing.prefix_attention) == ("ca2", peer["prefix_attention"])
        )  # fmt: skip
        show(f"{peer['peer']} over ca2 ({peer['prefix_attention']}): {peer['ratio']:.2f}")
    if args.json:
        found = {
            "device": jax.devices()[0].device_kind, "jax": jax.__version__,
            "options": dataclasses.asdict(args), "ratios": ratios, "peers": peers,
            "timings": [dataclasses.asdict(timing) for timing in timings],
            "peak_bytes": _peak_bytes(),
        }  # fmt: skip
        print(json.dumps(found))
    return 0


def _peer(args: BenchVideo, variant: str) -> dict[str, Any]:
    """PyTorch's figures, from a process of its own: its memory and ours would crowd each other."""
    fields = json.dumps(dataclasses.asdict(args))
    argv = [sys.executable, "-m", "kvjax.infer.bench.video_torch", fields, variant]
    # JAX is imported there too, and is not to take the device's memory.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise InputError("PyTorch's part failed, see above; --peer none leaves it out")
    return json.loads(done.stdout.splitlines()[-1])


def _ratios(timings: list[VideoTiming]) -> list[dict[str, Any]]:
    """Each variant of ca2 beside each other method: the speed-up, and the paper's arithmetic's."""
    ours = [timing for timing in timings if timing.method == "ca2"]
    others = [timing for timing in timings if timing.method != "ca2"]
    pairs = [(a, b) for a in ours for b in others]
    return [
        {
            "prefix_attention": a.prefix_attention,
            "over": b.method,
            "speedup": sum(b.seconds) / sum(a.seconds),
            "bound": sum(b.released_teramacs) / sum(a.released_teramacs),
        }
        for a, b in pairs
    ]


def _peak_bytes() -> int | None:
    """The most memory that the device held, where it says so."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def _line(timing: VideoTiming) -> str:
    last = timing.seconds[len(timing.seconds) // 2 :]
    used = "" if timing.utilisation is None else f"  {timing.utilisation:5.1%} of peak"
    return (
        f"{timing.method:<7} prefix attention {timing.prefix_attention:<5} x {timing.rows}: "
        f"{sum(timing.seconds):8.2f} s, late chunks {float(np.median(last)):7.3f} s{used}; "
        f"first {timing.first_seconds:.1f} s"
    )


def _ratio_line(ratio: dict[str, Any]) -> str:
    return (
        f"ca2 ({ratio['prefix_attention']}) over {ratio['over']}: {ratio['speedup']:.2f} of "
        f"{ratio['bound']:.2f}, {ratio['speedup'] / ratio['bound']:.0%}"
    )
