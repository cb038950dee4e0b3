"""Where a token of a video stands: fixed tables for places, cyclic ones or rotations for frames."""

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["cyclic_rows", "frame_table", "place_table", "rotate_frames", "timestep_features"]

Array = jax.Array


def _waves(positions: np.ndarray, size: int) -> np.ndarray:
    """[..., size]: sines, then cosines, of positions at size / 2 frequencies; float64."""
    frequency = 10_000.0 ** (-np.arange(size // 2) / (size / 2))
    angle = positions[..., None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)


def frame_table(rows: int, size: int) -> np.ndarray:
    """The temporal position embeddings, float32[rows, size] (Ca2-VDM's table)."""
    return _waves(np.arange(rows), size).astype(np.float32)


def place_table(height: int, width: int, size: int) -> np.ndarray:
    """The spatial ones, float32[height * width, size]: the column's half, then the row's."""
    row, column = (x.reshape(-1) for x in np.mgrid[:height, :width])
    parts = [_waves(column, size // 2), _waves(row, size // 2)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def cyclic_rows(frames: Array, table: int, sink_frames: int = 0) -> Array:
    """The row of the table that each frame takes: its index modulo the table (Ca2-VDM).

    Sink frames never leave the window, so they keep rows of their own and the others take turns in
    what is left; otherwise two frames of a window would stand in one row.

    Args:
        frames: int32[...] indices in the video, 0 for the first frame.
        table: rows of the table.
        sink_frames: how many of the first frames stay in the window.
    """
    turns = sink_frames + (frames - sink_frames) % (table - sink_frames)
    return jnp.where(frames < sink_frames, frames, turns)


def rotate_frames(x: Array, positions: Array) -> Array:
    """Rotary embedding (Su et al. 2021) of neighbouring pairs, as the released model has it.

    Args:
        x: [B, S, H, T, D].
        positions: int32[T].
    """
    size = x.shape[-1]
    frequency = 10_000.0 ** (-np.arange(0, size, 2) / size)
    angle = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequency, jnp.float32)[None]
    sin, cos = (f(angle)[None, None, None] for f in (jnp.sin, jnp.cos))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def timestep_features(t: Array, size: int = 256) -> Array:
    """Sinusoids of timesteps, float32[..., size]: cosines, then sines."""
    half = size // 2
    frequency = jnp.asarray(np.exp(-np.log(10_000.0) * np.arange(half) / half), jnp.float32)
    angle = t.astype(jnp.float32)[..., None] * frequency.reshape((1,) * t.ndim + (-1,))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
