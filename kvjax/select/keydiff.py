"""KeyDiff (Park et al. 2025): keys that differ from the mean key."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.select.scorer import Scorer
from kvjax.select.view import View

__all__ = ["KeyDiff"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(Scorer):
    """Keeps the keys that are least like the mean of all directions; looks at no query."""

    def scores(self, view: View) -> jax.Array:
        """The negative cosine to the mean of the normed keys."""

        def one(layer: jax.Array) -> jax.Array:
            keys = view.keys(layer)  # 0 where not in use: adds nothing to the mean
            norm = jnp.linalg.norm(keys, axis=-1, keepdims=True)
            unit = keys / jnp.maximum(norm, 1e-12)
            anchor = jnp.sum(unit, axis=2)
            anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
            return -jnp.einsum("kbsd,kbd->kbs", unit, anchor, precision="highest")

        return jax.lax.map(one, jnp.arange(view.shape[0], dtype=jnp.int32))
