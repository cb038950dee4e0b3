"""Products of few rows in plain JAX."""

import jax
import jax.numpy as jnp

__all__ = ["gated_product_reference", "product_reference"]

Array = jax.Array


def product_reference(x: Array, w: Array) -> Array:
    """See `api.product`."""
    # float32 means float32, on accelerators too, where the default is a shorter product.
    return jnp.matmul(x, w, precision="highest" if w.dtype == jnp.float32 else None)


def gated_product_reference(x: Array, w: Array) -> Array:
    """See `api.gated_product`."""
    gate, up = jnp.split(product_reference(x, w.reshape(w.shape[0], -1)), 2, axis=-1)
    return jax.nn.silu(gate) * up
