"""Attention over places: inside frames, to the frames of a prefix, to a text."""

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.devices import default_device

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
    full = None if mask is None else mask[:, None, None, :]
    if (implementation or _best(q, mask)) == "cudnn":
        with jax.numpy_dtype_promotion("standard"):  # jax.nn mixes dtypes there
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    # float32 in, float32 through: on accelerators the default would shorten the products.
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        out = jax.nn.dot_product_attention(*wide, mask=full, implementation="xla")
    return out.astype(q.dtype)


def _best(q: Array, mask: Array | None) -> str:
    """CuDNN's flash attention where it takes the heads, which have a multiple of 8 channels."""
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return "cudnn" if fits and mask is None and default_device().platform == "gpu" else "xla"
