"""What a video model can do so far: beginnings of clips, continued and written as one GIF."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.models.video_dit import VideoDiT
from kvjax.models.video_rollout import Rollout, rollout, split_video_model
from kvjax.video_files import tile_videos, to_bytes, write_video

__all__ = ["SampleGrid"]

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SampleGrid:
    """Continues the same beginnings whenever it is asked.

    Attributes:
        graph: of the model.
        options: how chunks are made.
        first: float32[B, 1, H, W, C], the beginnings, as the model sees them.
        frames: how many frames are made, about.
        folder: for the GIFs.
        decode: from what the model makes, float32[N, ...], to frames between -1 and 1.
    """

    graph: nnx.GraphDef[Any]
    options: Rollout
    first: np.ndarray
    frames: int
    folder: Path
    decode: Callable[[Array], Array] = lambda x: x

    def write(self, params: Any, step: int) -> None:
        """Writes `folder`/STEP.gif."""
        model: VideoDiT = nnx.merge(self.graph, params)
        keys = jax.random.split(jax.random.key(0), len(self.first))
        chunks = rollout(split_video_model(model), jnp.asarray(self.first), keys, self.options)
        count = -(-(self.frames - 1) // model.config.chunk)
        videos = np.concatenate([self.first, *itertools.islice(chunks, count)], axis=1)
        frames = np.asarray(self.decode(jnp.asarray(videos.reshape(-1, *videos.shape[2:]))))
        frames = to_bytes(frames).reshape(*videos.shape[:2], *frames.shape[1:])
        write_video(self.folder / f"{step:06}.gif", tile_videos(frames), scale=2)
