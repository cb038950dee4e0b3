"""`kvjax video`: goes on from a first frame for as long as is asked."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from kvjax.errors import InputError
from kvjax.infer.commands.shared import parse_arguments
from kvjax.infer.compilations import keep_compilations
from kvjax.infer.video import Rollout, rollout, split_video_model
from kvjax.infer.video_output import FrameCodec, VideoOutput, open_codec
from kvjax.models.text_encoder import load_text_encoder
from kvjax.models.video_dit import Text
from kvjax.models.video_folder import VideoModel, load_video_model
from kvjax.moving_digits import MovingDigits, load_digit_images

__all__ = ["Video", "main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """Make a video from its first frame, chunk by chunk; the file grows while it is made."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "video-tiny"
    """A finished run of `kvjax train video`, its model folder, or a built-in model (video-tiny)."""
    first_frame: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A picture, or a video whose first frame is taken; without it, moving digits are drawn."""
    seed: int = 0
    """Of the noise, and of the moving digits."""
    frames: int = 80
    """Frames of the video, the first one included."""
    out: Path = Path("video.gif")
    """The video: .gif, or .mp4, .webm, ... with the extra kvjax[video]."""
    method: Annotated[str, tyro.conf.arg(metavar="NAME")] = "ca2"
    """ca2, the cache; os-ext, os-fix or joint compute the past again, see `kvjax.infer.video`."""
    steps: int | None = None
    """Denoising steps of a chunk; by default the model's own."""
    sampler: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """ddpm, ddim or few_step; by default the model's own."""
    guidance: float = 1.0
    """With a text: how strongly it is followed."""
    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """For a model with text: what to show; needs --text-encoder."""
    text_encoder: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A Hugging Face folder of the T5 (v1.1) that the model was trained with."""
    text: Annotated[Path | None, tyro.conf.arg(metavar="FILE.npz")] = None
    """In place of a prompt its embedding: `text` [tokens, size] and maybe `text_mask`."""
    autoencoder: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """For a model of latents: the folder of its AutoencoderKL."""
    dtype: Annotated[str, tyro.conf.arg(metavar="TYPE")] = "float32"
    """float32 or bfloat16, of the computation and of the cache."""
    fps: float = 10.0
    """Frames a second, when it is watched."""
    scale: int = 4
    """Each pixel becomes a square of so many pixels of a side."""
    json: bool = False
    """Print nothing but one JSON object with the figures."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_arguments(Video, "kvjax video", argv)
    _check(args)
    output = VideoOutput(args.out, fps=args.fps, scale=args.scale)
    keep_compilations()
    model = load_video_model(args.model, dtype=args.dtype)
    codec = open_codec(model.config, args.autoencoder)
    start = time.perf_counter()
    first = _first_frame(args, model, codec)
    seconds = []
    with tqdm(total=args.frames, unit="frame", disable=None, file=sys.stderr) as bar:
        for frames in _chunks(args, model, codec, first):
            frames = frames[: args.frames - output.length]
            output.add(frames)
            bar.update(len(frames))
            seconds.append(time.perf_counter() - start)
            if output.length == args.frames:
                break
    output.close()
    _report(args, seconds)
    return 0


def _check(args: Video) -> None:
    for name in ("frames", "scale"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be 1 or more, not {getattr(args, name)}")
    if not args.fps > 0:
        raise InputError(f"--fps must be more than 0, not {args.fps}")
    if args.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype is {args.dtype!r}: use float32 or bfloat16")


def _chunks(
    args: Video, model: VideoModel, codec: FrameCodec, first: np.ndarray
) -> Iterator[np.ndarray]:
    """uint8[T, H, W, C], the first frame and then every chunk."""
    options = _options(args, model)
    text = _text(args, model, options.copies)
    split = split_video_model(nnx.merge(model.graph, model.params), consume=True)
    keys = jax.random.key(args.seed)[None]
    yield codec.to_pixels(jnp.asarray(first))
    for chunk in rollout(split, jnp.asarray(first)[None], keys, options, text):
        yield codec.to_pixels(chunk[0])


def _options(args: Video, model: VideoModel) -> Rollout:
    changes = {"kind": args.sampler, "steps": args.steps}
    changes = {name: value for name, value in changes.items() if value is not None}
    sampler = dataclasses.replace(model.sampler, guidance=args.guidance, **changes)
    if args.guidance != 1.0 and not model.config.text_dim:
        raise InputError("--guidance needs a text, and this model knows none")
    return Rollout(method=args.method, sampler=sampler, prefix_step=model.prefix_step)


def _first_frame(args: Video, model: VideoModel, codec: FrameCodec) -> np.ndarray:
    """float32[1, h, w, C], as the model sees it."""
    if args.first_frame is not None:
        return codec.read(args.first_frame)
    if "digits" not in model.data:
        raise InputError("this model was trained on other videos: give it a --first-frame")
    digits = MovingDigits(**model.data["digits"])
    return codec.to_model(digits.video(load_digit_images("test"), args.seed, 0, 1))


def _text(args: Video, model: VideoModel, copies: int) -> Text | None:
    """The text of every row: with guidance, none and then the text."""
    if not model.config.text_dim:
        if args.text is not None or args.prompt is not None:
            raise InputError("this model knows no texts: leave --prompt and --text out")
        return None
    none = nnx.merge(model.graph, model.params).no_text(1)
    if args.text is None and args.prompt is None:
        return Text(*(jnp.concatenate([x] * copies) for x in none))
    tokens, size = none.embed.shape[1:]
    embed, there = _embedding(args, tokens)
    missing = tokens - embed.shape[1]
    if embed.shape[2] != size or missing < 0:
        raise InputError(
            f"the text is {list(embed.shape[1:])}, and the model wants up to {tokens} tokens of "
            f"{size}: use the encoder that it was trained with"
        )
    padded = jnp.pad(embed, ((0, 0), (0, missing), (0, 0))).astype(none.embed.dtype)
    given = Text(padded, jnp.pad(there.astype(bool), ((0, 0), (0, missing))))
    if copies == 1:
        return given
    return Text(*(jnp.concatenate(pair) for pair in zip(none, given, strict=True)))


def _embedding(args: Video, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """float32[1, N, size] and bool[1, N] of the prompt, or of the file that has it."""
    if args.prompt is not None and args.text is None:
        if args.text_encoder is None:
            raise InputError("--prompt needs --text-encoder, the folder of a T5; or give --text")
        return load_text_encoder(args.text_encoder)([args.prompt], tokens)
    if args.prompt is not None:
        raise InputError("--prompt and --text: give one of them")
    assert args.text is not None
    try:
        with np.load(args.text) as file:
            embed = file["text"].astype(np.float32)[None]
            there = file["text_mask"][None] if "text_mask" in file else np.ones(embed.shape[:2])
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"{args.text}: no .npz with `text` ({e})") from None
    return embed, there


def _report(args: Video, seconds: list[float]) -> None:
    chunks = np.diff(seconds[1:])  # the first chunk compiles
    figures = {
        "out": str(args.out),
        "frames": args.frames,
        "method": args.method,
        "seconds": round(seconds[-1], 2),
        "seconds_per_chunk": round(float(np.median(chunks)), 3) if len(chunks) else None,
    }
    if args.json:
        print(json.dumps(figures))
    else:
        print(f"{args.frames} frames in {figures['seconds']} s: {args.out}")
