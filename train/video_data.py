"""Clips to train a video model on: moving digits, a folder of videos, or a folder of latents.

A clip is a pure function of its number, so that a batch is one of its step's: whoever makes it, a
thread or a process, and however often a run was interrupted. In a folder every clip comes once
before any comes twice; clips of a video do not overlap.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from kvjax.errors import InputError
from kvjax.models.video_config import VideoDiTConfig
from kvjax.moving_digits import DigitImages, MovingDigits, load_digit_images
from kvjax.video_files import SUFFIXES, count_frames, fit_frames, read_frames, to_grey

__all__ = ["Clip", "Clips", "DigitClips", "LatentFolder", "VideoFolder", "open_folder"]


class Clip(NamedTuple):
    """A clip.

    Attributes:
        video: uint8[T, H, W, C] pixels, or float32[T, h, w, C], the means of latents.
        spread: float32[T, h, w, C], the latents' standard deviations, or None.
        text: float32[N, text_dim], or None.
        text_mask: bool[N], which of the text's tokens are there, or None.
    """

    video: np.ndarray
    spread: np.ndarray | None = None
    text: np.ndarray | None = None
    text_mask: np.ndarray | None = None


class Clips(Protocol):
    """Where clips come from."""

    def clip(self, number: int, frames: int) -> Clip:
        """The clip with this number, its first `frames` frames."""
        ...


@dataclasses.dataclass(frozen=True)
class DigitClips:
    """Moving digits, never the same twice."""

    moving: MovingDigits
    images: DigitImages
    seed: int

    @staticmethod
    def load(moving: MovingDigits, seed: int, split: str = "train") -> "DigitClips":
        """With scikit-learn's digits of a split."""
        return DigitClips(moving, load_digit_images(split), seed)

    def clip(self, number: int, frames: int) -> Clip:
        """See `Clips`."""
        return Clip(self.moving.video(self.images, self.seed, number, frames))


@dataclasses.dataclass(frozen=True)
class _Folder:
    """Clips of files, in an order of its own in each epoch.

    Attributes:
        places: of each clip, its file and the first frame.
        model: whose frames they are to be.
        every: of a file only every so many frames are taken.
        seed: of the order.
    """

    places: tuple[tuple[Path, int], ...]
    model: VideoDiTConfig
    every: int
    seed: int

    def place(self, number: int) -> tuple[Path, int]:
        """File and first frame of a clip."""
        epoch, index = divmod(number, len(self.places))
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, epoch)))
        return self.places[int(rng.permutation(len(self.places))[index])]


@dataclasses.dataclass(frozen=True)
class VideoFolder(_Folder):
    """Videos as files; frames are scaled and cut to the model's size. Channels are colours."""

    def clip(self, number: int, frames: int) -> Clip:
        """See `Clips`."""
        path, first = self.place(number)
        video = read_frames(path, first, (frames - 1) * self.every + 1)[:: self.every]
        video = fit_frames(video, self.model.height, self.model.width)
        if self.model.channels == 1:
            video = to_grey(video)
        return Clip(video)


@dataclasses.dataclass(frozen=True)
class LatentFolder(_Folder):
    """Latents as .npz files with `mean` [T, h, w, C] and, where there are, `spread`, `text` and
    `text_mask`."""  # noqa: D209

    def clip(self, number: int, frames: int) -> Clip:
        """See `Clips`."""
        path, first = self.place(number)
        chosen = slice(first, first + (frames - 1) * self.every + 1, self.every)
        with np.load(path) as file:
            video, spread = (
                file[name][chosen].astype(np.float32) if name in file else None
                for name in ("mean", "spread")
            )
            assert video is not None  # `open_folder` looked
            return Clip(video, spread, *self._text(path, file))

    def _text(self, path: Path, file: np.lib.npyio.NpzFile) -> tuple[np.ndarray, ...]:
        tokens, size = self.model.text_tokens, self.model.text_dim
        if not size:
            return ()
        if "text" not in file or file["text"].shape[1] != size:
            raise InputError(f"{path}: the model wants `text` of [tokens, {size}], and it has none")
        text = file["text"][:tokens].astype(np.float32)
        there = file["text_mask"][:tokens] if "text_mask" in file else np.ones(len(text), bool)
        more = tokens - len(text)
        return np.pad(text, ((0, more), (0, 0))), np.pad(there.astype(bool), (0, more))


def open_folder(
    folder: Path, model: VideoDiTConfig, frames: int, *, every: int = 1, seed: int = 0
) -> VideoFolder | LatentFolder:
    """The clips of a folder, its subfolders included.

    Args:
        folder: with videos, or with .npz files of latents.
        model: whose frames they are to be.
        frames: of a clip; shorter files are left out.
        every: of a file only every so many frames are taken.
        seed: of their order.

    Raises:
        InputError: there is no file that is long enough, or latents of another shape.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one with videos or with .npz latents")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    latents = [path for path in files if path.suffix == ".npz"]
    videos = [path for path in files if path.suffix.lower() in SUFFIXES]
    lengths = [(path, _latent_frames(path, model)) for path in latents]
    lengths = lengths or [(path, count_frames(path)) for path in videos]
    span = (frames - 1) * every + 1
    places = tuple((p, at) for p, length in lengths for at in range(0, length - span + 1, span))
    if not places:
        raise InputError(
            f"{folder}: none of {len(lengths)} videos has {span} frames; give longer ones, or "
            "take smaller model.max_prefix or every"
        )
    return (LatentFolder if latents else VideoFolder)(places, model, every, seed)


def _latent_frames(path: Path, model: VideoDiTConfig) -> int:
    wanted = (model.height, model.width, model.channels)
    with np.load(path) as file:
        shape: tuple[int, ...] = file["mean"].shape if "mean" in file else (0,)
    if shape[1:] != wanted:
        raise InputError(f"{path}: `mean` is {list(shape)}, and the model wants [T, *{wanted}]")
    return shape[0]
