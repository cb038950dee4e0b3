"""Who sees whom."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Window", "attention_options", "window_mask"]

Array = jax.Array

Window = jax.Array | int
"""How many of the last positions a query sees, itself included; 0: all."""


def attention_options(length: int, window: Window) -> dict[str, Any]:
    """A causal mask, with a window of a static size or with one that is data.

    In the words of `jax.nn.dot_product_attention`.
    """
    if isinstance(window, int):
        return {"is_causal": True, "local_window_size": (window - 1, 0) if window else None}
    return {"mask": window_mask(length, window)}


def window_mask(length: int, window: Array) -> Array:
    """Who sees whom, bool[1, 1, T, T], for an int32 scalar `window`."""
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    return ((key <= query) & ((window == 0) | (key > query - window)))[None, None]
