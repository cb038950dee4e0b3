"""Moving digits: videos with exact laws of motion, made of scikit-learn's handwritten digits.

Digits fly straight at a constant speed, bounce off the walls, and cross each other without a
collision; where they overlap the brighter one is seen. So the true continuation of any two frames
is known, which natural videos do not offer. After Moving MNIST (Srivastava et al. 2015), with the
8 by 8 digits that scikit-learn brings (Alpaydin and Kaynak 1998). A video is a pure function of a
seed and its number.
"""

import dataclasses
from typing import Any

import numpy as np

from kvjax.errors import InputError

__all__ = ["DigitImages", "MovingDigits", "Scene", "load_digit_images"]

_TRAINING = 1500  # of the 1797 images; the others are for evaluations


@dataclasses.dataclass(frozen=True)
class DigitImages:
    """Handwritten digits.

    Attributes:
        images: float32[N, 8, 8], ink from 0 to 1.
        labels: int32[N], 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray


def load_digit_images(split: str = "train") -> DigitImages:
    """scikit-learn's digits: 1500 for "train", 297 others for "test".

    Raises:
        InputError: scikit-learn is not installed, or there is no such split.
    """
    if split not in ("train", "test"):
        raise InputError(f"digits have no split {split!r}: use train or test")
    try:
        import sklearn.datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "moving digits are made of scikit-learn's: install 'kvjax[video]'"
        ) from None
    digits: Any = sklearn.datasets.load_digits()
    part = slice(0, _TRAINING) if split == "train" else slice(_TRAINING, None)
    images = np.asarray(digits.images[part] / 16, np.float32)
    return DigitImages(images, np.asarray(digits.target[part], np.int32))


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is in a video and where.

    Attributes:
        images: float32[N, 8, 8] of the digits.
        labels: int32[N].
        corners: float64[T, N, 2], top and left of each digit in pixels, in every frame.
        velocity: float64[N, 2] in pixels a frame, before any bounce.
    """

    images: np.ndarray
    labels: np.ndarray
    corners: np.ndarray
    velocity: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingDigits:
    """How the videos are made.

    Attributes:
        size: pixels of a side of the square frame.
        digits: how many are in a video.
        digit_size: pixels of a side of a digit.
        slowest: pixels a frame, of any digit.
        fastest: likewise; speeds are uniform between them and directions are uniform too.
    """

    size: int = 32
    digits: int = 2
    digit_size: int = 14
    slowest: float = 0.75
    fastest: float = 2.0

    def __post_init__(self) -> None:
        if self.digits < 1 or not 1 <= self.digit_size <= self.size:
            raise InputError(
                f"{self.digits} digits of {self.digit_size} pixels in frames of {self.size}: give "
                "1 or more, not larger than the frame"
            )
        if not 0 <= self.slowest <= self.fastest:
            raise InputError(
                f"speeds from {self.slowest} to {self.fastest}: give 0 or more, rising"
            )

    def scene(self, images: DigitImages, seed: int, index: int, frames: int) -> Scene:
        """The scene number `index` of a seed; it moves the same however many frames are asked."""
        rng = np.random.default_rng(np.random.SeedSequence((seed, index)))
        chosen = rng.integers(len(images.labels), size=self.digits)
        room = float(self.size - self.digit_size)
        start = rng.uniform(0, room, (self.digits, 2))
        angle = rng.uniform(0, 2 * np.pi, self.digits)
        speed = rng.uniform(self.slowest, self.fastest, self.digits)
        velocity = speed[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=-1)
        flight = start + velocity * np.arange(frames)[:, None, None]
        return Scene(images.images[chosen], images.labels[chosen], _bounce(flight, room), velocity)

    def frames(self, scene: Scene) -> np.ndarray:
        """uint8[T, size, size, 1], 0 is black."""
        rows, columns = (self._spread(scene.corners[..., axis]) for axis in (0, 1))
        # Scaling up and shifting by parts of a pixel is linear in rows and in columns.
        ink = np.einsum("tnyi,nij,tnxj->tnyx", rows, scene.images, columns, optimize=True)
        return np.rint(255 * np.clip(ink.max(axis=1), 0, 1)).astype(np.uint8)[..., None]

    def video(self, images: DigitImages, seed: int, index: int, frames: int) -> np.ndarray:
        """The frames of scene number `index` of a seed, uint8[T, size, size, 1]."""
        return self.frames(self.scene(images, seed, index, frames))

    def _spread(self, corner: np.ndarray) -> np.ndarray:
        """[T, N] corners to [T, N, size, 8]: how much each pixel has of each row of the digit."""
        pixel = np.arange(self.size) + 0.5 - corner[..., None]
        place = pixel * (8 / self.digit_size) - 0.5
        return np.maximum(0, 1 - np.abs(place[..., None] - np.arange(8))).astype(np.float32)


def _bounce(flight: np.ndarray, room: float) -> np.ndarray:
    """Straight flights folded into [0, room], as between two mirrors."""
    if room == 0:
        return np.zeros_like(flight)
    return room - np.abs(np.mod(flight, 2 * room) - room)
