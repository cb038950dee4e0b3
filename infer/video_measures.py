"""How good generated videos are: against the true motion, and as a distribution.

Where the laws of motion are known, so is every frame: frame errors and a digit classifier say how
long a video stays true. Over many videos the Fréchet distance between features says how far what
is made is from what is real. With the features of `ClipFeatures`, trained here, it is a distance of
its own and no FVD; FVD needs the I3D network, which a user may bring (`load_i3d`).
"""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.errors import InputError
from kvjax.models.frame_features import CLIP_FRAMES, Network, crop_digits
from kvjax.moving_digits import MovingDigits, Scene
from kvjax.video_files import fit_frames, to_unit

__all__ = [
    "Features", "clip_features", "digit_agreement", "frame_errors", "frechet_distance", "load_i3d",
    "network_features", "windows",
]  # fmt: skip

Features = Callable[[np.ndarray], np.ndarray]
"""From uint8[N, 16, H, W, C] to float features [N, D]."""


def frame_errors(videos: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared error of each frame, pixels from 0 to 1.

    Args:
        videos: uint8[B, T, H, W, C].
        truth: likewise, the true continuations.

    Returns:
        float64[T], means over the videos.
    """
    difference = (videos.astype(np.float64) - truth) / 255
    return np.mean(difference**2, axis=(0, 2, 3, 4))


def digit_agreement(
    network: Network, moving: MovingDigits, videos: np.ndarray, scenes: list[Scene]
) -> np.ndarray:
    """How often the classifier sees the right digit where the laws of motion put it.

    Digits that touch another in a frame are not asked about there.

    Args:
        network: "digits" of `load_network`.
        moving: how the scenes move.
        videos: uint8[B, T, H, W, 1].
        scenes: of each video, with at least T frames.

    Returns:
        float64[T], shares from 0 to 1; NaN for a frame in which all digits touch.
    """
    classify = jax.jit(lambda params, x: jnp.argmax(nnx.merge(network.graph, params)(x), axis=-1))
    frames = videos.shape[1]
    right, asked = np.zeros(frames), np.zeros(frames)
    for video, scene in zip(videos, scenes, strict=True):
        corners = scene.corners[:frames]
        crops = crop_digits(to_unit(video), corners, moving.digit_size)
        found = np.asarray(classify(network.params, crops.reshape(-1, *crops.shape[2:])))
        gaps = np.abs(corners[:, :, None] - corners[:, None]).max(axis=-1)
        gaps = gaps + 1e9 * np.eye(corners.shape[1])
        apart = gaps.min(axis=-1) >= moving.digit_size
        same = found.reshape(apart.shape) == scene.labels
        right += (same & apart).sum(axis=1)
        asked += apart.sum(axis=1)
    return np.divide(right, asked, out=np.full(frames, np.nan), where=asked > 0)


def windows(videos: np.ndarray, first: int, frames: int = CLIP_FRAMES) -> np.ndarray:
    """The `frames` frames from `first` on of every video [B, T, ...]."""
    if first + frames > videos.shape[1]:
        raise InputError(
            f"videos of {videos.shape[1]} frames have no {frames} from {first} on: make them longer"
        )
    return videos[:, first : first + frames]


def network_features(network: Network, rows: int = 64) -> Features:
    """Features of `ClipFeatures`, so many clips at a time."""
    jitted = jax.jit(lambda params, x: nnx.merge(network.graph, params)(x))
    return functools.partial(clip_features, functools.partial(jitted, network.params), rows=rows)


def clip_features(
    network: Callable[[Any], Any], clips: np.ndarray, *, rows: int = 64
) -> np.ndarray:
    """What a network says of clips, a few at a time; the last are filled up to compile once."""
    found = []
    for first in range(0, len(clips), rows):
        part = to_unit(clips[first : first + rows])
        full = np.pad(part, ((0, rows - len(part)), *((0, 0),) * (part.ndim - 1)))
        found.append(np.asarray(network(full))[: len(part)])
    return np.concatenate(found)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance between normals with the means and covariances of two sets.

    |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)) (Dowson and Landau 1982), as in FID and FVD.

    Args:
        a: float[N, D], N at least 2. With N below D it is still defined, and too large.
        b: float[M, D].
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if min(len(a), len(b)) < 2:
        raise InputError(f"{len(a)} and {len(b)} clips have no covariance: give 2 or more of each")
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # The eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2).
    product = np.linalg.eigvalsh(root @ cov_b @ root)
    shift = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    cross = 2 * np.sum(np.sqrt(np.maximum(product, 0)))
    return float(max(0.0, shift + np.trace(cov_a) + np.trace(cov_b) - cross))


def load_i3d(path: str | Path) -> Features:
    """The I3D network of a user's TorchScript file, as StyleGAN-V's FVD takes it.

    Frames are scaled to 224 by 224 and cut; the features are its 400 logits.

    Raises:
        InputError: PyTorch is not installed, or the file is none of TorchScript.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("I3D is a TorchScript file: install torch to use it") from None
    try:
        with warnings.catch_warnings():  # PyTorch discourages the only format that there is of it
            warnings.simplefilter("ignore", DeprecationWarning)
            network: Any = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as e:
        first = str(e).strip().splitlines()[:1]
        raise InputError(f"{path}: no TorchScript file ({' '.join(first)})") from None

    def features(clips: np.ndarray) -> np.ndarray:
        found = []
        for clip in clips:
            rgb = np.broadcast_to(clip, (*clip.shape[:3], 3))
            x = to_unit(fit_frames(np.ascontiguousarray(rgb), 224, 224)).transpose(3, 0, 1, 2)
            with torch.no_grad():
                out = network(
                    torch.from_numpy(np.ascontiguousarray(x[None])),
                    rescale=False, resize=False, return_features=True,
                )  # fmt: skip
            found.append(out.numpy().reshape(-1))
        return np.stack(found)

    return features
