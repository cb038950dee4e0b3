"""SnapKV (Li et al. 2024): the attention of an observation window, smoothed over neighbours."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.select.pieces import smooth
from kvjax.select.scorer import Scorer
from kvjax.select.view import View, attention_received, by_kv_head

__all__ = ["SnapKV"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Scorer):
    """Keeps what the last queries attend to, in each KV head, and these queries' own tokens.

    Attributes:
        last: the observation window, alpha; its tokens always stay and count in the budget.
        kernel: tokens over which the attention is smoothed, odd; 1 does not smooth.
        pooling: "mean" (as kvpress) or "max" (as the authors' code).
    """

    last: int = 32
    kernel: int = 5
    pooling: str = "mean"

    @property
    def observed(self) -> int:
        """The observation window."""
        return self.last

    def scores(self, view: View) -> jax.Array:
        """The window's attention, summed over its queries, the mean over a KV head's queries."""
        layers = jnp.arange(view.shape[0], dtype=jnp.int32)
        received = attention_received(view, layers, self.last, view.table.length - self.last)
        return smooth(by_kv_head(received, view.shape[1]), self.kernel, self.pooling)
