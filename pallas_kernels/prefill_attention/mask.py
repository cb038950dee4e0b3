"""Who sees whom, in the words of `jax.nn.dot_product_attention`."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Window", "attention_options"]

Window = jax.Array | int
"""How many of the last positions a query sees, itself included; 0: all."""


def attention_options(length: int, window: Window) -> dict[str, Any]:
    """A causal mask, with a window of a static size or with one that is data."""
    if isinstance(window, int):
        return {"is_causal": True, "local_window_size": (window - 1, 0) if window else None}
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    seen = (key <= query) & ((window == 0) | (key > query - window))
    return {"mask": seen[None, None]}
