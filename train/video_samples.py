"""What a video model can do so far: beginnings of clips, continued and written as one GIF."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.diffusion import Sampler, add_noise, linear_schedule, sample
from kvjax.diffusion.sampler import row_noise
from kvjax.models.video_config import VideoDiTConfig
from kvjax.video_files import write_video

__all__ = ["SampleGrid", "grid", "to_bytes", "to_unit"]

Array = jax.Array
_START, _PREFIX = 1000, 1001  # of noise; smaller numbers are steps of the sampler


def to_unit(frames: Any) -> Any:
    """uint8 pixels as float32 from -1 to 1."""
    return frames.astype(np.float32) * np.float32(2 / 255) - np.float32(1)


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """Pixels from -1 to 1 as uint8."""
    return np.rint((np.clip(frames, -1, 1) + 1) * 127.5).astype(np.uint8)


def grid(videos: np.ndarray, columns: int = 4) -> np.ndarray:
    """[B, T, H, W, C] side by side with a line between: [T, ..., ..., C]."""
    rows = -(-len(videos) // columns)
    videos = np.pad(videos, ((0, rows * columns - len(videos)), *((0, 0),) * 4))
    videos = np.pad(videos, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=96)
    _, t, h, w, c = videos.shape
    tiles = videos.reshape(rows, columns, t, h, w, c).transpose(2, 0, 3, 1, 4, 5)
    return tiles.reshape(t, rows * h, columns * w, c)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SampleGrid:
    """Continues the same beginnings whenever it is asked.

    Attributes:
        graph: of the model.
        config: its sizes.
        sampler: how chunks are denoised.
        prefix_step: the noise level of clean frames, or None.
        first: float32[B, 1, H, W, C], the beginnings, as the model sees them.
        frames: how many frames are made.
        folder: for the GIFs.
        decode: from what the model makes, float32[N, ...], to frames between -1 and 1.
    """

    graph: nnx.GraphDef[Any]
    config: VideoDiTConfig
    sampler: Sampler
    prefix_step: int | None
    first: np.ndarray
    frames: int
    folder: Path
    decode: Callable[[Array], Array] = lambda x: x

    def write(self, params: Any, step: int) -> None:
        """Writes `folder`/STEP.gif."""
        videos = np.asarray(self._continued(params))
        frames = np.asarray(self.decode(jnp.asarray(videos.reshape(-1, *videos.shape[2:]))))
        frames = to_bytes(frames).reshape(*videos.shape[:2], *frames.shape[1:])
        write_video(self.folder / f"{step:06}.gif", grid(frames), scale=2)

    @functools.cached_property
    def _continued(self) -> Callable[[Any], Array]:
        return jax.jit(self._continue)

    def _continue(self, params: Any) -> Array:
        """float32[B, 1 + chunks * chunk, H, W, C]."""
        model = nnx.merge(self.graph, params)
        rows, chunk = self.first.shape[0], self.config.chunk
        keys, first = jax.random.split(jax.random.key(0), rows), jnp.asarray(self.first)
        ring = model.write(self._noised(first, keys), self.config.ring(rows).init())
        shape = (chunk, *first.shape[2:])

        def one(ring: Any, number: Array) -> tuple[Any, Array]:
            mine = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            x = sample(
                lambda x, t: model.denoise(x, t, ring), row_noise(mine, _START, shape), mine,
                self.sampler,
            )  # fmt: skip
            return model.write(self._noised(x, mine), ring), x

        count = -(-(self.frames - 1) // chunk)
        _, chunks = jax.lax.scan(one, ring, jnp.arange(1, count + 1))
        made = jnp.swapaxes(chunks, 0, 1).reshape(rows, -1, *shape[1:])
        return jnp.concatenate([first, made], axis=1)

    def _noised(self, x: Array, keys: Array) -> Array:
        if self.prefix_step is None:
            return x
        noise = row_noise(keys, _PREFIX, x.shape[1:])
        step = jnp.full(x.shape[:1], self.prefix_step, jnp.int32)
        return add_noise(linear_schedule(), x, noise, step)
