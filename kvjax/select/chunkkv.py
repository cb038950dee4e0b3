"""ChunkKV (Liu et al. 2025): whole chunks of tokens, the same in all heads of a layer."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.window_scores import summarize
from kvjax.select.pieces import keep_best, recent
from kvjax.select.snapkv import SnapKV
from kvjax.select.view import Policy, View

__all__ = ["ChunkKV"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkKV(Policy):
    """Scores tokens as SnapKV, sums over heads, and keeps the chunks of the largest mean.

    Attributes:
        chunk: tokens of a chunk. A whole number of them is kept.
        last: the observation window; it always stays and counts in the budget.
        kernel: as in SnapKV.
        reuse: layers that take over the choice of the first of them; 1: each chooses.
    """

    chunk: int = 16
    last: int = 16
    kernel: int = 5
    reuse: int = 1

    @property
    def observed(self) -> int:
        """The observation window."""
        return self.last

    def keep(self, view: View, tokens: jax.Array) -> jax.Array:
        """See `Policy.keep`."""
        scores = SnapKV(last=self.last, kernel=self.kernel).scores(view)
        end = jnp.minimum(tokens[None, None], self.last)  # [1, 1, B]
        free = view.live & (view.slot < (view.length - end)[..., None])
        summed = jnp.sum(scores, axis=1, keepdims=True)[:: self.reuse]
        chunks = summarize(summed, free[:: self.reuse, :1], self.chunk, None)
        some = summarize(jnp.ones_like(summed), free[:: self.reuse, :1], self.chunk, None) > 0
        count = jnp.broadcast_to((tokens[None, None] - end) // self.chunk, chunks.shape[:3])
        kept = keep_best(jnp.where(some, chunks, -jnp.inf), count)
        kept = jnp.repeat(jnp.repeat(kept, self.chunk, axis=-1), self.reuse, axis=0)
        kept = jnp.broadcast_to(kept[: view.shape[0], :, :, : view.shape[3]], view.shape)
        whole = (tokens[None, None] >= view.length)[..., None]
        last = recent(view, jnp.broadcast_to(end, view.shape[:3]))
        return view.live & ((kept & free) | last | whole)
