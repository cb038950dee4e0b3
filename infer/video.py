"""Videos without end from a `VideoDiT`: the rollout, and a rollout in a file.

>>> import itertools, jax, jax.numpy as jnp
>>> from flax import nnx
>>> from kvjax.diffusion import Sampler
>>> from kvjax.models.video_dit import VideoDiT, VideoDiTConfig
>>> config = VideoDiTConfig(height=8, width=8, num_layers=2, embed_dim=32, num_heads=4)
>>> model = split_video_model(VideoDiT(config, rngs=nnx.Rngs(0)))
>>> keys = jax.random.split(jax.random.key(0), 1)
>>> chunks = rollout(model, jnp.zeros((1, 1, 8, 8, 4)), keys, Rollout(sampler=Sampler(steps=2)))
>>> [chunk.shape for chunk in itertools.islice(chunks, 2)]
[(1, 8, 8, 8, 4), (1, 8, 8, 8, 4)]
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvjax.errors import InputError
from kvjax.models.video_rollout import (
    METHODS,
    Rollout,
    RolloutState,
    SplitVideoModel,
    history_mask,
    next_chunk,
    rollout,
    split_video_model,
    start,
)

__all__ = [
    "METHODS", "Rollout", "RolloutState", "SplitVideoModel", "history_mask", "load_rollout",
    "next_chunk", "rollout", "save_rollout", "split_video_model", "start",
]  # fmt: skip


def save_rollout(path: str | Path, state: RolloutState) -> None:
    """Writes a video in the making to a file (safetensors), which appears whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    bare = dataclasses.replace(state, keys=jax.random.key_data(state.keys))
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(bare))}
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(leaves, part, metadata={"given": str(state.given)})
        part.replace(path)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: cannot be written ({e})") from None
    finally:
        part.unlink(missing_ok=True)


def load_rollout(
    path: str | Path, model: SplitVideoModel, options: Rollout, videos: int = 1
) -> RolloutState:
    """Reads what `save_rollout` wrote; what comes next is the same, bit for bit.

    Args:
        path: of the file.
        model: the one it was made with.
        options: as it was made.
        videos: how many are in it.

    Raises:
        InputError: the file cannot be read, or is of another model, other options or other videos.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            given = int(file.metadata()["given"])
            leaves = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        raise InputError(f"{path}: is no saved video: give what `save_rollout` wrote") from None
    like = jax.eval_shape(lambda: _empty(model, options, videos, given))
    wanted, structure = jax.tree.flatten(like)
    found = [_shape(leaf, options) for leaf in leaves]
    if found != [_shape(leaf, options) for leaf in wanted]:
        raise InputError(f"{path}: is of another model or other options: load it with its own")
    state = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])
    return dataclasses.replace(state, keys=jax.random.wrap_key_data(state.keys))


def _shape(leaf: Any, options: Rollout) -> tuple[Any, ...]:
    """What has to fit. A history, the one array of 5 axes without a ring, may be of any length."""
    history = options.method != "ca2" and leaf.ndim == 5
    return (str(leaf.dtype), *((leaf.shape[:1] + leaf.shape[2:]) if history else leaf.shape))


def _empty(model: SplitVideoModel, options: Rollout, videos: int, given: int) -> RolloutState:
    """A state of the same structure, with the keys' data in place of keys."""
    config, ring, history = model.config, None, None
    if options.method == "ca2":
        ring = config.ring(options.copies * videos, options.dtype).init()
    else:
        history = jnp.zeros((videos, 1, config.height, config.width, config.channels))
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), videos))
    return RolloutState(keys, jnp.int32(0), ring, history, given)
