"""CuDNN's flash attention, which never holds the square of scores, with gradients."""

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.devices import CUDNN_TILE
from kvjax.pallas_kernels.prefill_attention.mask import Window, attention_options

__all__ = ["prefill_attention_cudnn"]

Array = jax.Array


def prefill_attention_cudnn(
    q: Array, k: Array, v: Array, window: Window, scale: float
) -> tuple[Array, Array]:
    """See `api.prefill_attention`."""
    length = q.shape[1]
    # Nobody sees what comes after: padding at the end changes nothing before it.
    padding = ((0, 0), (0, -length % CUDNN_TILE), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
    # jax.nn mixes dtypes there; strict promotion is for our own arithmetic.
    with jax.numpy_dtype_promotion("standard"):
        out, lse = jax.nn.dot_product_attention(
            q, k, v, scale=scale, implementation="cudnn", return_residual=True,
            **attention_options(q.shape[1], window),
        )  # fmt: skip
    return out[:, :length], lse[:, :length].astype(jnp.float32)
