"""Two small networks that look at moving digits, to measure generated ones.

`DigitClassifier` says which digit is in a crop. `ClipFeatures` says of 16 frames which digits move
and how fast; what it computes just before that are features, whose distributions can be compared
(see `frechet_distance`). It is trained here, on moving digits: distances between its features are
no FVD and not comparable with any.
"""

import dataclasses
import itertools
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.models.weights import load_weights

__all__ = [
    "CLIP_FRAMES", "CROP", "ClipFeatures", "DigitClassifier", "Network", "crop_digits",
    "load_network",
]  # fmt: skip

Array = jax.Array
CROP = 16
"""Pixels of a side of what the classifier sees."""
CLIP_FRAMES = 16
"""Frames that the features are computed from."""


def _conv(
    inputs: int, outputs: int, size: tuple[int, ...], rngs: nnx.Rngs, strides: int = 1
) -> nnx.Conv:
    return nnx.Conv(
        inputs, outputs, size, strides=strides, padding="SAME", precision="highest", rngs=rngs
    )


def _pool(x: Array, *window: int) -> Array:
    return nnx.max_pool(x, window, strides=window)


class DigitClassifier(nnx.Module):
    """Scores of the ten digits, float32[N, 10], of crops float32[N, 16, 16, 1] from -1 to 1."""

    def __init__(self, width: int = 32, *, rngs: nnx.Rngs) -> None:
        sizes = (1, width, 2 * width, 2 * width)
        self.convs: nnx.List[Any] = nnx.List(
            [_conv(i, o, (3, 3), rngs) for i, o in itertools.pairwise(sizes)]
        )
        flat = 2 * 2 * sizes[-1]
        self.out: nnx.Linear = nnx.Linear(flat, 10, precision="highest", rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """The scores."""
        for conv in self.convs:
            x = _pool(jax.nn.relu(conv(x)), 2, 2)
        return self.out(x.reshape(x.shape[0], -1))


class ClipFeatures(nnx.Module):
    """Features float32[N, 64] of clips float32[N, 16, 32, 32, 1] from -1 to 1."""

    def __init__(self, width: int = 24, features: int = 64, *, rngs: nnx.Rngs) -> None:
        sizes = (1, width, 2 * width, 4 * width)
        self.convs: nnx.List[Any] = nnx.List(
            [_conv(i, o, (3, 3, 3), rngs, strides=2) for i, o in itertools.pairwise(sizes)]
        )
        flat = 2 * 4 * 4 * sizes[-1]
        self.features: nnx.Linear = nnx.Linear(flat, features, precision="highest", rngs=rngs)
        self.out: nnx.Linear = nnx.Linear(features, 14, precision="highest", rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """The features."""
        for conv in self.convs:
            x = jax.nn.relu(conv(x))
        return self.features(x.reshape(x.shape[0], -1))

    def digits_and_motion(self, x: Array) -> tuple[Array, Array]:
        """What it is trained to say of digits and of their motion.

        Returns:
            float32[N, 10] log odds that each digit is there, and float32[N, 4] the speeds of two
            digits in pixels a frame, without their signs: up or down, the smaller first, then
            sideways.
        """
        out = self.out(jax.nn.relu(self(x)))
        return out[:, :10], out[:, 10:]


def crop_digits(frames: np.ndarray, corners: np.ndarray, digit_size: int) -> np.ndarray:
    """What the classifier sees of digits: squares around their centres, off the frame black.

    Args:
        frames: [T, H, W, 1], from -1 to 1.
        corners: [T, N, 2], top and left of each digit.
        digit_size: pixels of a side of a digit.

    Returns:
        float32[T, N, 16, 16, 1].
    """
    margin = CROP
    padded = np.pad(frames, ((0, 0), (margin,) * 2, (margin,) * 2, (0, 0)), constant_values=-1)
    # The corner of the square, to the nearest pixel.
    at = np.rint(corners + (digit_size - CROP) / 2).astype(int) + margin
    crops = [
        [padded[t, y : y + CROP, x : x + CROP] for y, x in at[t].tolist()] for t in range(len(at))
    ]
    return np.asarray(crops, np.float32)


@dataclasses.dataclass(frozen=True)
class Network:
    """One of the networks, split.

    Attributes:
        graph: of `nnx.split`.
        params: likewise.
    """

    graph: nnx.GraphDef[Any]
    params: nnx.State[Any, Any]


def load_network(kind: str, path: str | Path | None = None) -> Network:
    """A trained network.

    Args:
        kind: "digits" or "clips".
        path: of its weights; None: those that come with kvjax.
    """
    made = {"digits": DigitClassifier, "clips": ClipFeatures}[kind]
    if path is None:
        path = Path(str(resources.files("kvjax.models") / "video_tiny" / f"{kind}.safetensors"))
    graph, like = nnx.split(nnx.eval_shape(lambda: made(rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), like)
    return Network(graph, load_weights(Path(path), params))
