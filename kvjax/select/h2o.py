"""H2O (Zhang et al. 2023): heavy hitters, the tokens with the most attention of all queries."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.select.pieces import ends_and_best
from kvjax.select.scorer import Scorer
from kvjax.select.view import View, attention_received, by_kv_head

__all__ = ["H2O"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(Scorer):
    """Keeps the tokens that gathered the most attention over the whole prompt, and recent ones.

    Attributes:
        recent_share: of the budget that goes to the last tokens.
        normalize: divide by the number of queries that could see a token, as kvpress's
            `ObservedAttentionPress` does; the paper's sums favour early tokens.
    """

    recent_share: float = 0.5
    normalize: bool = False

    @property
    def observed(self) -> int:
        """All queries."""
        return -1

    def scores(self, view: View) -> jax.Array:
        """The attention that a token received, summed over queries, the mean over query heads."""
        layers = jnp.arange(view.shape[0], dtype=jnp.int32)
        received = attention_received(view, layers, -1, view.table.length)
        scores = by_kv_head(received, view.shape[1])
        if self.normalize:
            # The query of slot i sees slots 0 to i: n - i queries see slot i.
            seers = jnp.maximum(view.length[..., None] - view.slot, 1)
            scores = scores / seers.astype(jnp.float32)
        return scores

    def keep(self, view: View, tokens: jax.Array) -> jax.Array:
        """See `Policy.keep`."""
        scores = jnp.where(view.live, self.scores(view), -jnp.inf)
        counts = self.counts(view, tokens)
        last = (counts.astype(jnp.float32) * self.recent_share).astype(jnp.int32)
        near = view.slot >= (view.length - last)[..., None]
        # Recent ones first: no sum of weights reaches what they are raised by.
        return ends_and_best(view, scores + jnp.where(near, 1e9, 0.0), counts)
