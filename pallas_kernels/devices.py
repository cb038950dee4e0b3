"""Which device a function is traced for, and what its libraries take."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "CUDNN_TILE",
    "HOPPER_DIMS",
    "HOPPER_MULTIPROCESSORS",
    "HOPPER_PAGE_SIZES",
    "default_device",
    "fits_cudnn",
    "on_hopper",
]

CUDNN_TILE: int = 128
"""Keys of a tile of cuDNN's flash attention. At 64 keys more than a multiple of it the gradient is
NaN as soon as all scores of a query are below -88 (pytorch/pytorch issue 196678; a training run on
an H200 ended with such a gradient): give it whole tiles."""


HOPPER_MULTIPROCESSORS: int = 132
"""Of an H100 SXM or an H200."""

HOPPER_DIMS: tuple[int, ...] = (64, 80, 96, 128, 256)
"""Head sizes D that our kernels for Hopper take."""

HOPPER_PAGE_SIZES: tuple[int, ...] = (8, 16, 32, 64, 128)
"""Tokens a page that they take."""


def default_device() -> Any:
    """The `jax.Device` that work without a placement of its own goes to, as of now."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device


def on_hopper() -> bool:
    """Whether that is a Hopper GPU."""
    device = default_device()
    return device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"


def fits_cudnn(q: jax.Array) -> bool:
    """Whether cuDNN's flash attention takes queries [..., D], backwards too."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
