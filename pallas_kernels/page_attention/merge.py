"""Merging attention over disjoint sets of keys by the logarithm of their softmax sums."""

import jax
import jax.numpy as jnp

__all__ = ["merge", "scatter_merge"]

Array = jax.Array


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Attention over the union of two disjoint sets of keys.

    Commutative and associative (to rounding); a side without keys, (0, -inf), changes nothing.

    Args:
        out_a: float32[..., D].
        lse_a: float32[...], natural logarithm.
        out_b: as out_a.
        lse_b: as lse_a.
    """
    top = jnp.maximum(lse_a, lse_b)
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    weight_a, weight_b = jnp.exp(lse_a - safe), jnp.exp(lse_b - safe)
    total = weight_a + weight_b
    divisor = jnp.where(total > 0, total, 1.0)[..., None]
    out = (out_a * weight_a[..., None] + out_b * weight_b[..., None]) / divisor
    return out, jnp.where(total > 0, safe + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)


def scatter_merge(
    out: Array, lse: Array, query: Array, part: Array, part_lse: Array
) -> tuple[Array, Array]:
    """Merges partial results into those of their queries, of which several may be the same.

    Args:
        out: float32[T, H, D].
        lse: float32[T, H].
        query: int32[n], T or above is dropped.
        part: float32[n, H, D].
        part_lse: float32[n, H].
    """
    top = lse.at[query].max(part_lse, mode="drop")
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    old = jnp.exp(lse - safe)
    new = jnp.exp(part_lse - safe.at[query].get(mode="fill", fill_value=0.0))
    total = old.at[query].add(new, mode="drop")
    divisor = jnp.where(total > 0, total, 1.0)[..., None]
    summed = (out * old[..., None]).at[query].add(part * new[..., None], mode="drop")
    lse = jnp.where(total > 0, safe + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    return summed / divisor, lse
