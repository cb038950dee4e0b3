"""The `attend`s: what a decoder's layers may be given to attend with."""

import jax
import jax.numpy as jnp

from kvjax.models.decoder import Attend

__all__ = ["causal_attend"]

Array = jax.Array


def causal_attend(windows: Array | None = None) -> Attend:
    """Attention of whole sequences to themselves, for training and for scoring without a cache.

    Args:
        windows: int32[L] from `DecoderConfig.layer_windows`.

    Returns:
        An `attend` for q [B, T, H, D] and k, v [B, T, K, D] whose state passes through untouched.
    """

    def attend(layer: Array, q: Array, k: Array, v: Array, state: object) -> tuple[Array, object]:
        query, key = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None, :]
        seen = key <= query
        if windows is not None:
            window = windows[layer]
            seen &= (window == 0) | (key > query - window)
        # float32 in, float32 through: on accelerators the default would shorten the products.
        with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
            return jax.nn.dot_product_attention(q, k, v, mask=seen[None, None]), state

    return attend
