"""Plain XLA, float32 throughout, with gradients."""

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.prefill_attention.mask import Window, attention_options

__all__ = ["prefill_attention_reference"]

Array = jax.Array


def prefill_attention_reference(
    q: Array, k: Array, v: Array, window: Window, scale: float
) -> tuple[Array, Array]:
    """See `api.prefill_attention`; holds the square of scores."""
    # float32 in, float32 through: on accelerators the default would shorten the products.
    precision = "highest" if q.dtype == jnp.float32 else "default"
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    with jax.default_matmul_precision(precision):
        out, lse = jax.nn.dot_product_attention(
            *wide, scale=scale, implementation="xla", return_residual=True,
            **attention_options(q.shape[1], window),
        )  # fmt: skip
    return out.astype(q.dtype), lse
