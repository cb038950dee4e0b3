"""Attention over places: inside frames, to the frames of a prefix, to a text."""

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.devices import CUDNN_TILE, default_device, fits_cudnn
from kvjax.pallas_kernels.frame_attention.reference import dtype_product

__all__ = ["place_attention"]

Array = jax.Array


def place_attention(
    q: Array, k: Array, v: Array, *, mask: Array | None = None, implementation: str | None = None
) -> Array:
    """Softmax attention without any order among the keys.

    Args:
        q: [B, Q, H, D].
        k: [B, K, H, D].
        v: [B, K, H, D].
        mask: bool[B, K], which keys are there; None: all.
        implementation: "xla", "cudnn" (CUDA, 16-bit types), or None for the best here.

    Returns:
        [B, Q, H, D] in q's dtype.
    """
    if (implementation or _best(q, k, mask)) == "cudnn":
        with jax.numpy_dtype_promotion("standard"):  # jax.nn mixes dtypes there
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    product = dtype_product(q.dtype)
    scores = product("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return product("bhqk,bkhd->bqhd", weights, v).astype(q.dtype)


def _best(q: Array, k: Array, mask: Array | None) -> str:
    """CuDNN's flash attention where it takes the heads and the keys fill its tiles."""
    fits = fits_cudnn(q) and k.shape[1] % CUDNN_TILE == 0
    return "cudnn" if fits and mask is None and default_device().platform == "gpu" else "xla"
