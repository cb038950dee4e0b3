"""Knorm (Devoto et al. 2024): keys of small norm draw attention."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.select.scorer import Scorer
from kvjax.select.view import View

__all__ = ["Knorm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knorm(Scorer):
    """Keeps the keys of the smallest norm; looks at no query."""

    def scores(self, view: View) -> jax.Array:
        """The negative norm."""
        layers = jnp.arange(view.shape[0], dtype=jnp.int32)
        return jax.lax.map(lambda layer: -jnp.linalg.norm(view.keys(layer), axis=-1), layers)
