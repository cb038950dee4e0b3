"""AdaKV (Feng et al. 2024): the heads of a layer share its budget by need."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.select.budgets import share_out
from kvjax.select.pieces import ends_and_best, keep_best
from kvjax.select.scorer import Scorer
from kvjax.select.snapkv import SnapKV
from kvjax.select.view import Policy, View

__all__ = ["AdaKV"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV(Policy):
    """Of all heads' tokens of a layer the best stay, so a head that needs more gets more.

    Heads hold different numbers of pages: the pool's pages must span one head each.

    Attributes:
        scorer: what scores the tokens.
        floor: the part of an even share that each head keeps in any case.
    """

    scorer: Scorer = dataclasses.field(default_factory=SnapKV)
    floor: float = 0.2

    @property
    def observed(self) -> int:
        """As the scorer."""
        return self.scorer.observed

    def keep(self, view: View, tokens: jax.Array) -> jax.Array:
        """See `Policy.keep`."""
        scores = self.scorer.scores(view)
        counts = adaptive_counts(view, scores, tokens, self.floor, self.scorer.last)
        scorer = self.scorer
        return ends_and_best(view, scores, counts, sinks=scorer.sinks, last=scorer.last)


def adaptive_counts(
    view: View, scores: jax.Array, tokens: jax.Array, floor: float, last: int
) -> jax.Array:
    """How many tokens each head keeps: whole pages, in a layer as many as an even share gives.

    Args:
        view: of the cache.
        scores: float32[L, K, B, S].
        tokens: int32[B], the even share.
        floor: the part of it that each head keeps in any case.
        last: tokens at the end that always stay.

    Returns:
        int32[L, K, B].
    """
    layers, heads, rows, slots = view.shape
    even = jnp.broadcast_to(tokens[None, None], view.shape[:3])
    least = jnp.maximum((floor * even.astype(jnp.float32)).astype(jnp.int32), last)
    scores = jnp.where(view.live, scores, -jnp.inf)
    sure = ends_and_best(view, scores, jnp.minimum(least, even), last=last)
    rest = jnp.swapaxes(jnp.where(sure, -jnp.inf, scores), 1, 2).reshape(layers, rows, -1)
    kept = jnp.sum(sure, axis=-1, dtype=jnp.int32)
    left = heads * even[:, 0] - jnp.sum(kept, axis=1)
    more = keep_best(rest, left).reshape(layers, rows, heads, slots)
    counts = jnp.moveaxis(kept + jnp.swapaxes(jnp.sum(more, axis=-1, dtype=jnp.int32), 1, 2), 1, 0)
    whole = share_out(counts, heads * even[:, 0], view.page_size, (0,))
    counts = jnp.where(even >= view.length, view.length, jnp.moveaxis(whole, 0, 1))
    return jnp.minimum(counts, view.length)
