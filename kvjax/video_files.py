"""Videos as files: GIF through Pillow, everything else (mp4, webm, ...) through PyAV, by imageio.

PyAV, which holds ffmpeg's libraries, is in the extra `video`. Frames are uint8[T, H, W, 3].
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import imageio.v3 as iio
import numpy as np
from PIL import Image

from kvjax.errors import InputError

__all__ = [
    "SUFFIXES", "count_frames", "fit_frames", "read_frames", "read_image", "tile_videos",
    "to_bytes", "to_grey", "to_unit", "write_video",
]  # fmt: skip

SUFFIXES = (".gif", ".mp4", ".webm", ".mov", ".mkv", ".avi")
"""Endings of the files that are taken for videos."""


def count_frames(path: Path) -> int:
    """How many frames a video has."""
    with _explained(path), _open(path, "r") as file:
        stated = file.properties(index=...).n_images
        # Some formats do not state it.
        return stated or sum(1 for _ in file.iter())


def read_frames(path: Path, first: int = 0, count: int | None = None) -> np.ndarray:
    """Frames `first` to `first + count - 1` of a video, or all from `first` on, uint8[T, H, W, 3].

    Raises:
        InputError: the file is not there, is no video, or ends before that.
    """
    frames: list[np.ndarray] = []
    with _explained(path), _open(path, "r") as file:
        for number, frame in enumerate(file.iter()):
            if number >= first:
                frames.append(_rgb(frame))
            if len(frames) == count:
                break
    if not frames or (count is not None and len(frames) < count):
        raise InputError(
            f"{path}: ends after {first + len(frames)} frames, before {first + (count or 1)}: "
            "give a longer video"
        )
    return np.stack(frames)


def read_image(path: Path) -> np.ndarray:
    """A picture, or the first frame of a video, uint8[H, W, 3]."""
    if path.suffix.lower() in SUFFIXES:
        return read_frames(path, 0, 1)[0]
    with _explained(path):
        return _rgb(iio.imread(path, plugin="pillow", index=0))


def fit_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales frames until they just cover the size, and cuts the middle out.

    Args:
        frames: uint8[T, H, W, 3].
        height: wanted, in pixels.
        width: wanted, in pixels.
    """
    have = frames.shape[1:3]
    scale = max(height / have[0], width / have[1])
    if have != (height, width):
        box = [(size - want / scale) / 2 for size, want in zip(have, (height, width), strict=True)]
        corners = (box[1], box[0], have[1] - box[1], have[0] - box[0])
        frames = np.stack(
            [
                np.asarray(
                    Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC, corners)
                )
                for x in frames
            ]
        )
    return frames


def to_unit(frames: Any) -> Any:
    """uint8 pixels as float32 from -1 to 1."""
    return frames.astype(np.float32) * np.float32(2 / 255) - np.float32(1)


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """Pixels from -1 to 1 as uint8."""
    return np.rint((np.clip(frames, -1, 1) + 1) * 127.5).astype(np.uint8)


def to_grey(frames: np.ndarray) -> np.ndarray:
    """How bright colours look: uint8[..., 3] as uint8[..., 1]."""
    red, green, blue = (frames[..., i].astype(np.float32) for i in range(3))
    return np.rint(0.299 * red + 0.587 * green + 0.114 * blue).astype(np.uint8)[..., None]


def tile_videos(videos: np.ndarray, columns: int = 4) -> np.ndarray:
    """[B, T, H, W, C] side by side with a line between: [T, ..., ..., C]."""
    rows = -(-len(videos) // columns)
    videos = np.pad(videos, ((0, rows * columns - len(videos)), *((0, 0),) * 4))
    videos = np.pad(videos, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=96)
    _, t, h, w, c = videos.shape
    tiles = videos.reshape(rows, columns, t, h, w, c).transpose(2, 0, 3, 1, 4, 5)
    return tiles.reshape(t, rows * h, columns * w, c)


def write_video(path: Path, frames: np.ndarray, *, fps: float = 10.0, scale: int = 1) -> None:
    """Writes a GIF that repeats, or a video of another kind by the file's ending.

    The file is there whole or not at all: it is written beside its place and moved there.

    Args:
        path: with an ending of `SUFFIXES`.
        frames: uint8[T, H, W, 1 or 3].
        fps: frames a second.
        scale: each pixel becomes a square of so many, since small videos are hard to see.

    Raises:
        InputError: another ending, or the file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: unknown kind of video; use one of {', '.join(SUFFIXES)}")
    rgb = np.broadcast_to(frames, (*frames.shape[:3], 3))
    rgb = np.ascontiguousarray(rgb.repeat(scale, axis=1).repeat(scale, axis=2))
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    with _explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(part, rgb, fps)
            os.replace(part, path)  # noqa: PTH105 (the same, and quicker to read)
        finally:
            part.unlink(missing_ok=True)


def _write(path: Path, rgb: np.ndarray, fps: float) -> None:
    with _open(path, "w") as file:
        if path.suffix.lower() == ".gif":
            file.write(rgb, duration=1000 / fps, loop=0)
            return
        # The usual encodings halve the colours' resolution and want even sides.
        even = [(0, side % 2) for side in rgb.shape[1:3]]
        codec = "libvpx-vp9" if path.suffix.lower() == ".webm" else "libx264"
        file.write(np.pad(rgb, ((0, 0), *even, (0, 0)), mode="edge"), codec=codec, fps=fps)


def _open(path: Path, mode: Literal["r", "w"]) -> Any:
    if path.suffix.lower() == ".gif":
        return iio.imopen(path, mode, plugin="pillow")
    try:
        import av  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("videos other than GIF need PyAV: install 'kvjax[video]'") from None
    return iio.imopen(path, mode, plugin="pyav")


def _rgb(image: np.ndarray) -> np.ndarray:
    image = image[..., None] if image.ndim == 2 else image
    return np.broadcast_to(image[..., :3], (*image.shape[:2], 3))


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what Pillow and PyAV raise into one line."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        what = error.strerror or "not a picture or video that can be read"
        raise InputError(f"{path}: {what}: give a file that can be read or written") from None
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[-160:]
        raise InputError(f"{path}: not a video that can be read ({said})") from None
