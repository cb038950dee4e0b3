"""`frame_attention` in plain JAX: the oracle, and with XLA's batched products a way everywhere.

Scores and their sums are float32. The weights are rounded to the values' dtype before the second
product, as flash attention does, so that it runs on tensor cores.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["dtype_product", "frame_attention_reference"]

Array = jax.Array


def frame_attention_reference(
    q: Array, k: Array, v: Array, ring_k: Array | None, ring_v: Array | None,
    length: Array | int, mask: Array, scale: float, finite: bool,
) -> Array:  # fmt: skip
    """See `api.frame_attention`."""
    scores, values = (
        functools.partial(dtype_product(q.dtype), how)
        for how in ("bshid,bshjd->bshij", "bshij,bshjd->bshid")
    )
    if ring_k is None or ring_v is None:
        own = jnp.where(mask[:, None, None], scores(q, k) * scale, -jnp.inf)
        return values(jax.nn.softmax(own, axis=-1).astype(v.dtype), v).astype(q.dtype)

    frames = ring_k.shape[3]
    used = jnp.arange(frames) < length
    past = jnp.where(used[None, None, None, None], scores(q, ring_k), -jnp.inf)
    # Two products with the same queries XLA would make one: it would put all keys in one array, and
    # copy the ring for it in every call.
    own = scores(jax.lax.optimization_barrier(q), k)
    own = jnp.where(mask[:, None, None], own, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([past, own], axis=-1) * scale, axis=-1).astype(v.dtype)
    # Unused slots may hold NaN: a weight of 0 is not enough, since 0 * NaN is NaN.
    zero = jnp.zeros((), ring_v.dtype)
    held = ring_v if finite else jnp.where(used[None, None, None, :, None], ring_v, zero)
    out = values(weights[..., :frames], held) + values(weights[..., frames:], v)
    return out.astype(q.dtype)


def dtype_product(dtype: jnp.dtype) -> Callable[..., Array]:
    """An `einsum` whose sums are float32, and whose products are those of the dtype."""
    # float32 means float32, on accelerators too, where the default is a shorter product.
    precision = "highest" if dtype == jnp.float32 else None
    return functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
