"""Selections that score every token and keep the best, the same number in each layer and head."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.select.pieces import ends_and_best
from kvjax.select.view import Policy, View

__all__ = ["Scorer"]

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer(Policy):
    """A policy that is a score. Subclasses are frozen dataclasses with a `scores`.

    Attributes:
        sinks: how many of the first tokens always stay.
        last: how many of the last tokens always stay.
    """

    sinks: int = 0
    last: int = 0

    def scores(self, view: View) -> Array:
        """How much each token is wanted, float32[L, K, B, S], anything where not in use."""
        raise NotImplementedError

    def counts(self, view: View, tokens: Array) -> Array:
        """How many tokens each KV head of each layer keeps, int32[L, K, B]."""
        return jnp.broadcast_to(tokens[None, None], view.shape[:3])

    def keep(self, view: View, tokens: Array) -> Array:
        """See `Policy.keep`."""
        counts = self.counts(view, tokens)
        return ends_and_best(view, self.scores(view), counts, sinks=self.sinks, last=self.last)
