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
        last: the observation window; its tokens score more than all others.
        kernel: as in SnapKV.
        reuse: layers that take over the choice of the first of them; 1: each chooses.
    """

    chunk: int = 20
    last: int = 32
    kernel: int = 5
    reuse: int = 1

    @property
    def observed(self) -> int:
        """The observation window."""
        return self.last

    def keep(self, view: View, tokens: jax.Array) -> jax.Array:
        """See `Policy.keep`."""
        scores = SnapKV(last=self.last, kernel=self.kernel).scores(view)[:: self.reuse]
        live = view.live[:: self.reuse]
        window = recent(view, jnp.full(view.shape[:3], self.last, jnp.int32))[:: self.reuse]
        highest = jnp.max(jnp.where(live, scores, 0.0), axis=(0, 1, 3))[None, None, :, None]
        scores = jnp.sum(jnp.where(window, highest + 1, scores), axis=1, keepdims=True)
        chunks = summarize(scores, live[:, :1], self.chunk, None)
        first = jnp.arange(chunks.shape[-1], dtype=jnp.int32)[None, None, None] * self.chunk
        chunks = jnp.where(first < view.length[:: self.reuse, :1, :, None], chunks, -jnp.inf)
        count = jnp.maximum(tokens // self.chunk, 1)[None, None]
        kept = keep_best(chunks, jnp.broadcast_to(count, chunks.shape[:3]))
        kept = jnp.repeat(jnp.repeat(kept, self.chunk, axis=-1), self.reuse, axis=0)
        whole = (tokens[None, None] >= view.length)[..., None]
        return view.live & (kept[: view.shape[0], :, :, : view.shape[3]] | whole)
