"""What a selection looks at: a cache after its prefill, and what its last queries were.

Letters as in `kvjax.cache.pool`; S = M * P slots of a row, A observed queries.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache import KVPool, PageTable
from kvjax.pallas_kernels.window_scores import window_scores

__all__ = ["Observation", "Policy", "View", "attention_received", "by_kv_head"]

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """Queries of each row's last A positions, in order; shorter rows are padded at the front.

    Attributes:
        q: [L, B, A, H, D], rotated.
        lse: float32[L, B, A, H], logarithms of their softmax sums.
        position: int32[B, A] true positions; -1 for padding.
    """

    q: Array
    lse: Array
    position: Array

    def last(self, alpha: int) -> "Observation":
        """Those of the last `alpha` positions."""
        have = self.q.shape[2]
        if alpha > have:
            raise ValueError(f"{alpha} queries are wanted, {have} were recorded")
        first = have - alpha
        return Observation(
            q=self.q[:, :, first:], lse=self.lse[:, :, first:], position=self.position[:, first:]
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """A cache after its prefill, for a selection to look at.

    Attributes:
        pool: the pages.
        table: the rows.
        seen: the queries that were recorded.
        task: int32[B], 0 where the answer stands somewhere (localization), 1 where it has to be
            gathered (aggregation); None: not known.
        number: int32[B], on which random choices depend, so that a row's do not depend on its
            neighbours; None: a row's place in the batch.
        needles: bool[B, S], slots that hold what the answer needs; for the oracle.
        inverse_frequencies: float32[D/2] of the rotary embedding; for expected attention.
    """

    pool: KVPool
    table: PageTable
    seen: Observation
    task: Array | None = None
    number: Array | None = None
    needles: Array | None = None
    inverse_frequencies: Array | None = None

    @property
    def page_size(self) -> int:
        """P."""
        return self.pool.k.shape[3]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(L, K, B, S), the shape of scores and of what is kept."""
        _, j, b, m = self.table.pages.shape
        return self.seen.q.shape[0], j * self.pool.k.shape[2], b, m * self.page_size

    @property
    def length(self) -> Array:
        """Slots in use, int32[L, K, B]."""
        return self.of_heads(self.table.length)

    @property
    def slot(self) -> Array:
        """Each slot's index, int32[1, 1, 1, S]."""
        return jnp.arange(self.shape[-1], dtype=jnp.int32)[None, None, None]

    @property
    def live(self) -> Array:
        """Which slots are in use, bool[L, K, B, S]."""
        return self.slot < self.length[..., None]

    def of_heads(self, x: Array) -> Array:
        """Values of layer and head groups, [L/R, K/C, ...], as those of layers and heads."""
        _, r, c, _, _ = self.pool.k.shape
        return jnp.repeat(jnp.repeat(x, r, axis=0)[: self.seen.q.shape[0]], c, axis=1)

    def keys(self, layer: Array) -> Array:
        """One layer's keys, float32[K, B, S, D]; slots that are not in use are 0."""
        return self._tokens(self.pool.k, layer)

    def values(self, layer: Array) -> Array:
        """One layer's values, float32[K, B, S, D]; slots that are not in use are 0."""
        return self._tokens(self.pool.v, layer)

    def _tokens(self, plane: Array, layer: Array) -> Array:
        n, r, c, p, d = plane.shape
        pages = jnp.minimum(self.table.pages[layer // r], n - 1)  # [J, B, M]
        head = jnp.arange(c, dtype=jnp.int32)[None, :, None, None]
        tokens = plane[pages[:, None], layer % r, head]  # [J, C, B, M, P, D]
        tokens = tokens.reshape(-1, pages.shape[1], pages.shape[2] * p, d).astype(jnp.float32)
        length = jnp.repeat(self.table.length[layer // r], c, axis=0)
        return jnp.where((self.slot[0] < length[..., None])[..., None], tokens, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """A rule that says what stays of a cache. Subclasses are frozen dataclasses.

    Attributes:
        observed: how many of the last queries it looks at; -1: those of the whole prompt.
        whole_pages: keeps pages as they are, the same in all layers and heads that a page spans;
            what it frees is free without a byte being moved.
    """

    @property
    def observed(self) -> int:
        """See `Policy`."""
        return 0

    @property
    def whole_pages(self) -> bool:
        """See `Policy`."""
        return False

    def keep(self, view: View, tokens: Array) -> Array:
        """What stays.

        Args:
            view: of the cache.
            tokens: int32[B], how many tokens a KV head of a layer may keep on average.

        Returns:
            bool[L, K, B, S] by slot.
        """
        raise NotImplementedError


def attention_received(
    view: View, layers: Array, alpha: int, end: Array, *, window: int = 1, top: int | None = None
) -> Array:
    """What the last `alpha` queries pay to each window of tokens, a layer at a time.

    Args:
        view: of the cache.
        layers: int32[n], which.
        alpha: how many queries; -1: all that were recorded.
        end: int32[L/R, K/C, B], slots from there on are not scored.
        window: as in `window_scores`.
        top: likewise.

    Returns:
        float32[n, H, B, W].
    """
    seen = view.seen if alpha < 0 else view.seen.last(alpha)

    def one(layer: Array) -> Array:
        q, lse = seen.q[layer], seen.lse[layer]
        scores = window_scores(
            q, lse, view.pool, layer, view.table.pages, end, seen.position, window=window, top=top
        )
        return jnp.swapaxes(scores, 0, 1)

    return jax.lax.map(one, layers)


def by_kv_head(scores: Array, num_kv_heads: int) -> Array:
    """Scores of query heads, [n, H, B, S], as the means of each KV head's, [n, K, B, S]."""
    n, h, *rest = scores.shape
    return jnp.mean(scores.reshape(n, num_kv_heads, h // num_kv_heads, *rest), axis=2)
