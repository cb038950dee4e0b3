"""CuDNN's flash attention, which never holds the square of scores, with gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.devices import CUDNN_TILE
from kvjax.pallas_kernels.prefill_attention.mask import Window, window_mask

__all__ = ["prefill_attention_cudnn"]

Array = jax.Array


def prefill_attention_cudnn(
    q: Array, k: Array, v: Array, window: Window, scale: float
) -> tuple[Array, Array]:
    """See `api.prefill_attention`."""
    # `jax.nn.dot_product_attention` would round the lse to the outputs' 16 bits.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    length = q.shape[1]
    # Nobody sees what comes after: padding at the end changes nothing before it.
    padding = ((0, 0), (0, -length % CUDNN_TILE), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
    if isinstance(window, int):
        options: Any = {"mask_type": MaskType.CAUSAL, "sliding_window_length": window or None}
    else:
        options = {"mask": window_mask(q.shape[1], window)}
    # jax mixes dtypes there; strict promotion is for our own arithmetic.
    with jax.numpy_dtype_promotion("standard"):
        both: Any = dot_product_attention(q, k, v, scale=scale, return_residual=True, **options)
    out, lse = both
    return out[:, :length], jnp.swapaxes(lse, 1, 2)[:, :length]
