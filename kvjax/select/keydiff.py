"""KeyDiff (Park et al. 2025): keys that differ from the mean key."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.select.scorer import Scorer
from kvjax.select.view import View

__all__ = ["KeyDiff", "distinctness"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(Scorer):
    """Keeps the keys that are least like the mean of all directions; looks at no query."""

    def scores(self, view: View) -> jax.Array:
        """The negative cosine to the mean of the normed keys."""
        return distinctness(view, jnp.arange(view.shape[0], dtype=jnp.int32))


def distinctness(view: View, layers: jax.Array) -> jax.Array:
    """How unlike the mean key each key is: the negative cosine, float32[n, K, B, S].

    Args:
        view: of the cache.
        layers: int32[n], which.
    """

    def one(layer: jax.Array) -> jax.Array:
        keys = view.keys(layer)  # 0 where not in use: adds nothing to the mean
        norm = jnp.linalg.norm(keys, axis=-1, keepdims=True)
        unit = keys / jnp.maximum(norm, 1e-12)
        anchor = jnp.sum(unit, axis=2)
        anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
        return -jnp.einsum("kbsd,kbd->kbs", unit, anchor, precision="highest")

    return jax.lax.map(one, layers)
