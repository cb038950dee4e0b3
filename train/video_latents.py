"""`python -m kvjax.train.video_latents`: encodes a folder of videos once, to train on its latents.

Each video becomes one .npz with `mean` and `spread`, float16[T, h, w, C]: the autoencoder's
posterior, scaled to about unit variance, from which training draws anew every time. Texts may be
put beside them as `text` and `text_mask` (see `kvjax.train.video_data`).
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from kvjax.errors import InputError
from kvjax.models.autoencoder import load_autoencoder
from kvjax.train.program import run_main
from kvjax.video_files import SUFFIXES, fit_frames, read_frames, to_unit

__all__ = ["VideoLatents", "encode_folder", "main"]

Encode = Callable[[np.ndarray], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoLatents:
    """Encode a folder of videos into a folder of latents; what is there already is kept."""

    videos: tyro.conf.Positional[Path]
    """A folder of videos; its subfolders are taken too."""
    out: tyro.conf.Positional[Path]
    """A folder for the latents, by the same names."""
    autoencoder: Path
    """A diffusers folder with an AutoencoderKL."""
    size: int = 256
    """Pixels of a side; frames are scaled and their middle is cut out."""
    rows: int = 8
    """Frames that are encoded at a time."""


def encode_folder(args: VideoLatents) -> int:
    """Does what is asked; returns how many videos were encoded.

    Raises:
        InputError: there are no videos, or a file cannot be read.
    """
    files = sorted(p for p in args.videos.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{args.videos}: no videos there ({', '.join(SUFFIXES)})")
    _, graph, params = load_autoencoder(args.autoencoder)
    jitted = jax.jit(lambda params, x: nnx.merge(graph, params).encode(x))
    done = 0
    for path in tqdm(files, unit="video", disable=None):
        out = args.out / path.relative_to(args.videos).with_suffix(".npz")
        if not out.exists():
            mean, spread = _encode(path, args, lambda x: jitted(params, x))
            out.parent.mkdir(parents=True, exist_ok=True)
            part = out.with_suffix(".part.npz")
            np.savez(part, mean=mean, spread=spread)
            part.replace(out)
            done += 1
    return done


def _encode(path: Path, args: VideoLatents, encode: Encode) -> tuple[np.ndarray, np.ndarray]:
    frames = fit_frames(read_frames(path), args.size, args.size)
    found = []
    for first in range(0, len(frames), args.rows):
        part = frames[first : first + args.rows]
        # The last ones are filled up, so that one program does for all.
        full = np.pad(part, ((0, args.rows - len(part)), (0, 0), (0, 0), (0, 0)))
        found.append([np.asarray(x[: len(part)], np.float16) for x in encode(to_unit(full))])
    mean, spread = (np.concatenate(each) for each in zip(*found, strict=True))
    return mean, spread


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = tyro.cli(VideoLatents, prog="python -m kvjax.train.video_latents", args=argv)
    done = encode_folder(args)
    print(f"{done} videos encoded; the latents are in {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_main(main)
