"""PyramidKV (Cai et al. 2024): SnapKV with much in the lower layers and little in the upper."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.select.budgets import linear_budgets, share_out
from kvjax.select.snapkv import SnapKV
from kvjax.select.view import View

__all__ = ["PyramidKV"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV whose budgets fall in a line from the first layer to the last, in whole pages.

    Attributes:
        beta: the top layer keeps the beta-th part of the mean.
        fallback: what if that part is less than the observation window: True: all layers get the
            same (kvpress); False: the top layer gets the window and a page.
    """

    beta: int = 20
    fallback: bool = True

    def counts(self, view: View, tokens: jax.Array) -> jax.Array:
        """See `Scorer.counts`."""
        length = view.length[0, 0]
        least = 0 if self.fallback else self.last + view.page_size
        budgets = linear_budgets(tokens, length - self.last, view.shape[0], self.beta, least)
        fits = jnp.all(budgets >= self.last, axis=0)
        even = jnp.broadcast_to(tokens[None], budgets.shape)
        budgets = jnp.where(fits[None] & (tokens < length)[None], budgets, even)
        total = jnp.minimum(jnp.sum(budgets, axis=0), tokens * len(budgets))
        whole = share_out(budgets, total, view.page_size, (0,))
        whole = jnp.where(budgets >= length[None], length[None], whole)
        return jnp.repeat(whole[:, None], view.shape[1], axis=1)
