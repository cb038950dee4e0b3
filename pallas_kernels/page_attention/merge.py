"""Merging attention over disjoint sets of keys by the logarithm of their softmax sums."""

import jax
import jax.numpy as jnp

__all__ = ["finish", "guard", "merge", "scatter_merge"]

Array = jax.Array


def guard(top: Array) -> Array:
    """The largest exponent, or 0 where there is none: -inf - -inf is no number."""
    return jnp.where(jnp.isneginf(top), 0.0, top)


def finish(summed: Array, total: Array, top: Array) -> tuple[Array, Array]:
    """Out and lse from sums of weights `exp(x - top)`; (0, -inf) where there was nothing to sum.

    Args:
        summed: float32[..., D], the weighted values.
        total: float32[...], the weights.
        top: float32[...], from `guard`.
    """
    some = total > 0
    total = jnp.where(some, total, 1.0)
    return summed / total[..., None], jnp.where(some, top + jnp.log(total), -jnp.inf)


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Attention over the union of two disjoint sets of keys.

    Commutative and associative (to rounding); a side without keys, (0, -inf), changes nothing.

    Args:
        out_a: float32[..., D].
        lse_a: float32[...], natural logarithm.
        out_b: as out_a.
        lse_b: as lse_a.
    """
    top = guard(jnp.maximum(lse_a, lse_b))
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    summed = out_a * weight_a[..., None] + out_b * weight_b[..., None]
    return finish(summed, weight_a + weight_b, top)


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
    top = guard(lse.at[query].max(part_lse, mode="drop"))
    old = jnp.exp(lse - top)
    new = jnp.exp(part_lse - top.at[query].get(mode="fill", fill_value=0.0))
    total = old.at[query].add(new, mode="drop")
    summed = (out * old[..., None]).at[query].add(part * new[..., None], mode="drop")
    return finish(summed, total, top)
