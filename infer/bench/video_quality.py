"""`kvjax bench video-quality`: how long generated moving digits stay true, and how they drift.

Each video is given its first frames (by default nine, from which the motion can be seen), goes on
for ten chunks, and is held against what the laws of motion say. A second set is given one frame:
there the motion is free, and only distributions can be compared, chunk by chunk.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure

from kvjax.errors import InputError
from kvjax.infer.commands.shared import parse_arguments
from kvjax.infer.video import Rollout, SplitVideoModel, rollout, split_video_model
from kvjax.infer.video_measures import (
    Features,
    digit_agreement,
    frame_errors,
    frechet_distance,
    load_i3d,
    network_features,
    windows,
)
from kvjax.models.frame_features import CLIP_FRAMES, load_network
from kvjax.models.video_folder import VideoModel, load_video_model
from kvjax.moving_digits import MovingDigits, load_digit_images
from kvjax.video_files import to_bytes, to_unit

__all__ = ["VideoQuality", "main", "measure"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoQuality:
    """Measure videos of moving digits against the true motion and against true videos."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "video-tiny"
    """A run of `kvjax train video` on moving digits, or a built-in model (video-tiny)."""
    videos: int = 256
    """Videos of each set."""
    rows: int = 64
    """Videos that are made at a time."""
    given: int = 9
    """Frames that the videos of the first set begin with."""
    chunks: int = 10
    """How many chunks are made behind them."""
    method: Annotated[str, tyro.conf.arg(metavar="NAME")] = "ca2"
    """ca2, os-ext, os-fix or joint."""
    steps: int | None = None
    """Denoising steps of a chunk; by default the model's own."""
    i3d: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A TorchScript file of I3D: FVD is measured too."""
    dtype: Annotated[str, tyro.conf.arg(metavar="TYPE")] = "float32"
    """float32 or bfloat16."""
    seed: int = 2_000_000
    """Of the scenes and of the noise."""
    png: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw the curves into this picture."""
    json: bool = False
    """End with one JSON object on stdout."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_arguments(VideoQuality, "kvjax bench video-quality", argv)
    for name in ("videos", "rows", "given", "chunks"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be 1 or more, not {getattr(args, name)}")
    if args.png is not None and not args.png.parent.is_dir():
        raise InputError(f"--png {args.png}: no such folder; make it, or give another")
    figures = measure(args, load_video_model(args.model, dtype=args.dtype))
    if args.png is not None:
        _curves(figures).savefig(args.png, format="png")
    if args.json:
        print(json.dumps(figures))
    else:
        _print_table(figures)
    return 0


def measure(args: VideoQuality, model: VideoModel) -> dict[str, Any]:
    """All figures; a list has one entry for each chunk."""
    if "digits" not in model.data:
        raise InputError("this model was not trained on moving digits: their motion says nothing")
    moving, chunk = MovingDigits(**model.data["digits"]), model.config.chunk
    images, count = load_digit_images("test"), args.given + args.chunks * chunk
    scenes = [moving.scene(images, args.seed, i, count) for i in range(args.videos)]
    truth = np.stack([moving.frames(scene) for scene in scenes])
    others = range(args.videos, 2 * args.videos)
    real = np.stack([moving.video(images, args.seed, i, count) for i in others])
    split = split_video_model(nnx.merge(model.graph, model.params))
    start = time.perf_counter()
    made = _continue(args, model, split, truth[:, : args.given])
    free = _continue(args, model, split, truth[:, :1])
    seconds = time.perf_counter() - start
    frozen = np.repeat(truth[:, args.given - 1 : args.given], args.chunks * chunk, axis=1)
    behind = truth[:, args.given :]
    agreement = digit_agreement(load_network("digits"), moving, made, scenes)[args.given :]
    per_chunk = lambda x: [round(float(np.nanmean(y)), 5) for y in x.reshape(-1, chunk)]  # noqa: E731
    features = network_features(load_network("clips"))
    figures = {
        "device": jax.devices()[0].device_kind,
        "videos": args.videos,
        "given": args.given,
        "method": args.method,
        "seconds": round(seconds, 1),
        "mse": per_chunk(frame_errors(made[:, args.given :], behind)),
        "mse_of_last_frame_repeated": per_chunk(frame_errors(frozen, behind)),
        "digit_agreement": per_chunk(agreement),
        "digit_agreement_of_truth": per_chunk(
            digit_agreement(load_network("digits"), moving, truth, scenes)[args.given :]
        ),
        "frechet_digits": _drift(features, free, real, chunk),
        "frechet_digits_of_truth": _drift(features, truth, real, chunk),
    }
    if args.i3d is not None:
        figures["fvd"] = _drift(load_i3d(args.i3d), free, real, chunk)
    return figures


def _continue(
    args: VideoQuality, model: VideoModel, split: SplitVideoModel, first: np.ndarray
) -> np.ndarray:
    """uint8 videos that begin with `first`; as many chunks behind as are asked."""
    steps = {} if args.steps is None else {"steps": args.steps}
    sampler = dataclasses.replace(model.sampler, **steps)
    options = Rollout(method=args.method, sampler=sampler, prefix_step=model.prefix_step)
    keys = jax.random.split(jax.random.key(args.seed), len(first))
    videos = []
    for at in range(0, len(first), args.rows):
        mine = slice(at, at + args.rows)
        chunks = rollout(split, jnp.asarray(to_unit(first[mine])), keys[mine], options)
        made = [np.asarray(next(chunks)) for _ in range(args.chunks)]
        videos.append(np.concatenate([first[mine], *map(to_bytes, made)], axis=1))
    return np.concatenate(videos)


def _drift(features: Features, made: np.ndarray, real: np.ndarray, chunk: int) -> list[float]:
    """The distance of every 16 frames that begin with a chunk, from all those of real videos."""
    places = range(
        made.shape[1] % chunk, min(made.shape[1], real.shape[1]) - CLIP_FRAMES + 1, chunk
    )
    known = features(windows(real, 0))
    return [round(frechet_distance(features(windows(made, at)), known), 3) for at in places]


def _curves(figures: dict[str, Any]) -> Figure:
    """Errors, digits and drift by chunk, each beside what it is to be held against."""
    panels: dict[str, tuple[str, ...]] = {
        "mean squared error": ("mse", "mse_of_last_frame_repeated"),
        "share of right digits": ("digit_agreement", "digit_agreement_of_truth"),
        "Fréchet distance": ("frechet_digits", "frechet_digits_of_truth"),
    }
    if "fvd" in figures:
        panels["FVD"] = ("fvd",)
    figure = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            values = figures[name]
            axes.plot(range(1, len(values) + 1), values, marker="o", label=name)
        axes.set(xlabel="chunk", title=title, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


def _print_table(figures: dict[str, Any]) -> None:
    lists = {name: value for name, value in figures.items() if isinstance(value, list)}
    for name, value in figures.items():
        if name not in lists:
            print(f"{name}: {value}")
    for name, value in lists.items():
        print(f"{name + ' by chunk':<40}" + " ".join(f"{x:>8.4f}" for x in value))
