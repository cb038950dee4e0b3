"""TOVA (Oren et al. 2024): what the last query attends to."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.select.scorer import Scorer
from kvjax.select.view import View, attention_received

__all__ = ["TOVA"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(Scorer):
    """Keeps what the last query attends to, the same tokens in all heads of a layer."""

    last: int = 1

    @property
    def observed(self) -> int:
        """One query."""
        return 1

    def scores(self, view: View) -> jax.Array:
        """The last query's attention, the mean over all heads."""
        layers = jnp.arange(view.shape[0], dtype=jnp.int32)
        received = attention_received(view, layers, 1, view.table.length - 1)
        mean = jnp.mean(received, axis=1, keepdims=True)
        return jnp.broadcast_to(mean, view.shape)
