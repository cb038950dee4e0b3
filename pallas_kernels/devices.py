"""Which device a function is traced for."""

from typing import Any

import jax

__all__ = ["default_device"]


def default_device() -> Any:
    """The `jax.Device` that work without a placement of its own goes to, as of now."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device
