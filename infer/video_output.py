"""Between files and a video model: first frames in, finished frames out, chunk by chunk."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.errors import InputError
from kvjax.models.autoencoder import load_autoencoder
from kvjax.models.video_config import VideoDiTConfig
from kvjax.video_files import (
    SUFFIXES,
    fit_frames,
    read_image,
    to_bytes,
    to_grey,
    to_unit,
    write_video,
)

__all__ = ["FrameCodec", "VideoOutput", "open_codec"]

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class FrameCodec:
    """Frames as pixels, and as the model sees them.

    Attributes:
        height: of the pixels.
        width: of the pixels.
        channels: of the pixels, 1 or 3.
        encode: float32[N, H, W, C] from -1 to 1 -> float32[N, h, w, D].
        decode: the other way.
    """

    height: int
    width: int
    channels: int
    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]

    def read(self, path: Path) -> np.ndarray:
        """A picture, or the first frame of a video, scaled and cut to fit: float32[1, h, w, D]."""
        frames = fit_frames(read_image(path)[None], self.height, self.width)
        if self.channels == 1:
            frames = to_grey(frames)
        return self.to_model(frames)

    def to_model(self, frames: np.ndarray) -> np.ndarray:
        """uint8[N, H, W, C] -> float32[N, h, w, D]."""
        return np.asarray(self.encode(jnp.asarray(to_unit(frames))))

    def to_pixels(self, latents: Array) -> np.ndarray:
        """float32[N, h, w, D] -> uint8[N, H, W, C]."""
        return to_bytes(np.asarray(self.decode(latents)))


def open_codec(config: VideoDiTConfig, autoencoder: Path | None = None) -> FrameCodec:
    """The codec of a model.

    Args:
        config: of the model.
        autoencoder: a diffusers folder, for a model of latents; None: the model sees pixels.

    Raises:
        InputError: the model's channels are no colours and there is no autoencoder, or they are
            not those of the autoencoder.
    """
    c = config
    if autoencoder is None:
        if c.channels not in (1, 3):
            raise InputError(
                f"the model makes latents of {c.channels} channels: give --autoencoder the folder "
                "of the AutoencoderKL that they are of"
            )
        return FrameCodec(c.height, c.width, c.channels, lambda x: x, lambda x: x)
    sizes, graph, params = load_autoencoder(autoencoder)
    if sizes.latent_channels != c.channels:
        raise InputError(
            f"{autoencoder}: makes latents of {sizes.latent_channels} channels, and the model "
            f"wants {c.channels}: give the autoencoder that it was trained with"
        )
    encode = jax.jit(lambda params, x: nnx.merge(graph, params).encode(x)[0])
    decode = jax.jit(lambda params, x: nnx.merge(graph, params).decode(x))
    return FrameCodec(
        c.height * sizes.factor, c.width * sizes.factor, sizes.in_channels,
        functools.partial(encode, params), functools.partial(decode, params),
    )  # fmt: skip


class VideoOutput:
    """A video file that can be watched while it grows.

    It is whole at every moment: it is written again with more frames whenever it has grown by a
    tenth, so that all the writing together stays in proportion to the video.
    """

    def __init__(self, path: Path, *, fps: float, scale: int) -> None:
        """Nothing is written yet.

        Raises:
            InputError: the path does not end like a video.
        """
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"{path}: unknown kind of video; use one of {', '.join(SUFFIXES)}")
        self.path: Path = path
        self._fps, self._scale = fps, scale
        self._frames: list[np.ndarray] = []
        self._written = 0

    @property
    def length(self) -> int:
        """Frames so far."""
        return sum(len(frames) for frames in self._frames)

    def add(self, frames: np.ndarray) -> None:
        """Puts uint8[T, H, W, C] behind what is there."""
        self._frames.append(frames)
        if self.length >= 1.1 * self._written:
            self.close()

    def close(self) -> None:
        """Writes what is not in the file yet."""
        if self.length > self._written:
            video = np.concatenate(self._frames)
            write_video(self.path, video, fps=self._fps, scale=self._scale)
            self._written = self.length
