"""PyramidKV (Cai et al. 2024): SnapKV with much in the lower layers and little in the upper."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.select.budgets import linear_budgets, redistribute, share_out
from kvjax.select.snapkv import SnapKV
from kvjax.select.view import View

__all__ = ["PyramidKV"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV whose budgets fall in a line from the first layer to the last.

    Budgets are whole pages. What a layer has beyond the prompt goes to the other layers.

    Attributes:
        beta: the top layer keeps the beta-th part of the mean, beside the observation window.
    """

    beta: int = 20

    def counts(self, view: View, tokens: jax.Array) -> jax.Array:
        """See `Scorer.counts`."""
        layers, heads = view.shape[:2]
        keep = jnp.minimum(tokens, self.last)
        budgets = jnp.stack(
            [keep + rest for rest in linear_budgets(tokens - keep, layers, self.beta, 0)]
        )
        length = view.length[:, 0]
        budgets = redistribute(budgets, length)
        whole = share_out(budgets, jnp.sum(budgets, axis=0), view.page_size, (0,))
        whole = jnp.where(budgets >= length, length, whole)
        return jnp.repeat(whole[:, None], heads, axis=1)
