"""`frame_attention` in plain JAX: the oracle, and with XLA's batched products a way everywhere.

Scores and their sums are float32. The weights are rounded to the values' dtype before the second
product, as flash attention does, so that it runs on tensor cores.
"""

import functools

import jax
import jax.numpy as jnp

__all__ = ["dtype_product", "frame_attention_reference"]

Array = jax.Array


def frame_attention_reference(
    q: Array, k: Array, v: Array, ring_k: Array | None, ring_v: Array | None,
    length: Array | int, mask: Array, scale: float,
) -> Array:  # fmt: skip
    """See `api.frame_attention`."""
    product = dtype_product(q.dtype)
    own = product("bshid,bshjd->bshij", q, k) * scale
    own = jnp.where(mask[:, None, None], own, -jnp.inf)
    if ring_k is None or ring_v is None:
        weights = jax.nn.softmax(own, axis=-1).astype(v.dtype)
        return product("bshij,bshjd->bshid", weights, v).astype(q.dtype)

    used = jnp.arange(ring_k.shape[3]) < length
    past = product("bshid,bshjd->bshij", q, ring_k) * scale
    past = jnp.where(used[None, None, None, None], past, -jnp.inf)
    # The softmax does not depend on what is subtracted, so no gradient has to flow through it.
    top = jnp.maximum(jnp.max(past, -1, keepdims=True), jnp.max(own, -1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    past, own = jnp.exp(past - top), jnp.exp(own - top)
    total = jnp.sum(past, -1, keepdims=True) + jnp.sum(own, -1, keepdims=True)
    # Unused slots may hold NaN: a weight of 0 is not enough, since 0 * NaN is NaN.
    held = jnp.where(used[None, None, None, :, None], ring_v, jnp.zeros((), ring_v.dtype))
    out = product("bshij,bshjd->bshid", past.astype(v.dtype), held)
    out = out + product("bshij,bshjd->bshid", own.astype(v.dtype), v)
    return (out / total).astype(q.dtype)


def dtype_product(dtype: jnp.dtype) -> functools.partial:
    """An `einsum` whose sums are float32, and whose products are those of the dtype."""
    # float32 means float32, on accelerators too, where the default is a shorter product.
    precision = "highest" if dtype == jnp.float32 else None
    return functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
