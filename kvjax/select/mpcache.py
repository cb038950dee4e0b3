"""MPCache (Zeng et al. 2025): evict once, then read a chosen part of what is left at each step.

Two halves. After the prefill the tokens that no query needs are evicted for good ("look once").
Of the others each decoding step reads those clusters that its query asks for: clusters are pages,
known by bounds of their keys (`page_bounds`) and chosen in two levels; neighbouring layers may
share a choice. With static=1 and the exact bound that is Quest (Tang et al. 2024).

The paper ranks tokens by the attention of the last fifth of the queries; the released code has a
threshold, without scale and mask: `mode`. The released code takes the first and the last cluster
beside its count, here they are part of it: `extra`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.cache import KVPool
from kvjax.errors import InputError
from kvjax.pallas_kernels.page_bounds import gather_bounds, merge_pages, score_bounds
from kvjax.select.pieces import ends_and_best, keep_best
from kvjax.select.view import Policy, View, attention_received, by_kv_head

__all__ = ["MPCache", "Read", "calibrate_sharing", "published_sharing"]

Array = jax.Array


class Read(NamedTuple):
    """What of its row's pages a step reads, in their order.

    Attributes:
        entry: int32[K/C, B, W], entries of the table; M or above: none.
        length: int32[K/C, B], tokens in them.
    """

    entry: Array
    length: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPCache(Policy):
    """Evicts once, then reads a part.

    Attributes:
        static: which part of the prompt's tokens stays, rounded up; tokens to come all do.
        dynamic: which part of the prompt's tokens a step reads, where no budget says it.
        window: the part of the prompt whose queries say what stays.
        mode: "ratio": the tokens that these queries attend to most; "threshold": all that the mean
            head of any of them gives `threshold` or more, as the released code.
        threshold: of the softmax without scale and mask.
        heads: "shared": the heads of a layer keep the same tokens, as published; "each": each KV
            head its own.
        last: how many of the prompt's last tokens stay in any case.
        rep: what stands for a page's keys, see `page_scores`.
        alpha: of "linear_minmax".
        fan: how many pages are a cluster of the first level; 1: there is one level only.
        first: which part of the first level's clusters is looked into.
        extra: the first and the last page are read beside those chosen, the last one unless the
            first level's clusters are all full, as the released code; else they are part of them.
        leaders: the layer by which each layer keeps and reads, itself or one before; empty: itself.
            See `published_sharing`, `calibrate_sharing`.
    """

    static: float = 0.4
    dynamic: float = 0.05
    window: float = 0.2
    mode: str = "ratio"
    threshold: float = 1e-4
    heads: str = "shared"
    last: int = 8
    rep: str = "linear_minmax"
    alpha: float = 0.6
    fan: int = 2
    first: float = 0.5
    extra: bool = False
    leaders: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        choices = {
            "mode": ("ratio", "threshold"),
            "heads": ("shared", "each"),
            "rep": ("linear_minmax", "mean", "exact_bound"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}: use one of {', '.join(allowed)}")
        for name in ("static", "dynamic", "window", "first"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}: a part is above 0 and at most 1")
        if self.fan < 1:
            raise InputError(f"fan={self.fan}: a cluster is of one page or more")

    @property
    def observed(self) -> int:
        """All queries: which are the last fifth depends on the prompt."""
        return -1

    @property
    def vectors(self) -> int:
        """How many vectors as long as a key a step reads of each page that it may choose."""
        return 2 if self.rep == "exact_bound" else 1

    def leader_layers(self, layers: int) -> tuple[int, ...]:
        """The layer by which each layer keeps and reads.

        Raises:
            InputError: leaders that are not there, or do not lead themselves.
        """
        leaders = self.leaders or tuple(range(layers))
        if len(leaders) != layers:
            raise InputError(f"{len(leaders)} leaders for {layers} layers: name one each")
        for layer, leader in enumerate(leaders):
            if not 0 <= leader <= layer or leaders[leader] != leader:
                raise InputError(f"layer {layer} cannot go by layer {leader}: it has no own choice")
        return leaders

    def keep(self, view: View, tokens: Array) -> Array:
        """See `Policy.keep`; `tokens` is what a step reads, of which no less is kept."""
        leaders = jnp.asarray(self.leader_layers(view.shape[0]), jnp.int32)
        if self.mode == "threshold":
            kept = view.live & self._above(view)[:, None]
            return kept[leaders]
        part = jnp.ceil(view.length.astype(jnp.float32) * self.static - 1e-4).astype(jnp.int32)
        count = jnp.maximum(part, tokens[None, None])
        return ends_and_best(view, self._scores(view), count, last=self.last)[leaders]

    def _scores(self, view: View) -> Array:
        """Attention of the last queries, float32[L, K, B, S]."""
        length = view.table.position
        begin = length - (length.astype(jnp.float32) * self.window).astype(jnp.int32)
        begin = jnp.minimum(begin, length - 1)
        position = view.seen.position
        seen = dataclasses.replace(
            view.seen, position=jnp.where(position >= begin[:, None], position, -1)
        )
        layers = jnp.arange(view.shape[0], dtype=jnp.int32)
        received = attention_received(
            dataclasses.replace(view, seen=seen), layers, -1, view.table.length
        )
        scores = by_kv_head(received, 1 if self.heads == "shared" else view.shape[1])
        return jnp.broadcast_to(scores, view.shape)

    def _above(self, view: View) -> Array:
        """The released rule: what any of the last queries gives the threshold, bool[L, B, S]."""
        length = view.table.position
        begin = length - (length.astype(jnp.float32) * self.window).astype(jnp.int32)
        asks = view.seen.position >= jnp.maximum(begin, 0)[:, None]  # [B, A]

        def one(layer: Array) -> Array:
            keys, q = view.keys(layer), view.seen.q[layer].astype(jnp.float32)
            q = q.reshape(*q.shape[:2], keys.shape[0], -1, q.shape[-1])
            score = jnp.einsum("bakgd,kbsd->bkgas", q, keys, precision="highest")
            live = jnp.swapaxes(view.live[layer], 0, 1)[:, :, None, None]
            weight = jax.nn.softmax(jnp.where(live, score, -jnp.inf), axis=-1)
            mean = jnp.mean(weight, axis=(1, 2))  # [B, A, S]
            return jnp.any(asks[..., None] & (mean >= self.threshold), axis=1)

        return jax.lax.map(one, jnp.arange(view.shape[0], dtype=jnp.int32))

    def width(self, tokens: int, page_size: int) -> int:
        """How many pages a step reads at most, W, where it may read so many tokens."""
        return max(1, tokens // page_size) + 2

    def choose(
        self, q: Array, pool: KVPool, layer: Array, pages: Array, length: Array, tokens: Array
    ) -> Array:
        """Which of its row's pages each query reads.

        Args:
            q: [B, H, D], a query for each row.
            pool: with bounds.
            layer: int32 scalar of L.
            pages: int32[L/R, K/C, B, M], the table.
            length: int32[L/R, K/C, B], slots in use.
            tokens: int32[B], how many each may read.

        Returns:
            bool[K/C, B, M]; heads that share pages read the same ones.
        """
        if pool.bounds is None:
            raise ValueError("MPCache chooses by the bounds of pages: the pool has none")
        size, groups = pool.k.shape[3], pages.shape[1]
        bounds, count = gather_bounds(pool.bounds, layer, pages, length, size)
        scores, live = self._of_groups(q, bounds, count, groups)
        least = 0 if self.extra else 1  # beside the ends nothing may be read, but never nothing
        most = jnp.broadcast_to(jnp.maximum(tokens // size, least)[None], live.shape[:2])
        ends = self._ends(count[:: count.shape[0] // groups], size)
        if self.fan > 1:
            merged, filled = merge_pages(bounds, count, self.fan)
            over, open_ = self._of_groups(q, merged, filled, groups)
            clusters = jnp.sum(open_, axis=-1, dtype=jnp.int32)
            some = (clusters.astype(jnp.float32) * self.first).astype(jnp.int32)
            some = jnp.maximum(some, -(-most // self.fan))
            looked_into = jnp.repeat(keep_best(over, some), self.fan, axis=-1)
            looked_into = looked_into[..., : scores.shape[-1]]
            around = jnp.repeat(_any_of(ends, self.fan), self.fan, axis=-1)
            around = around[..., : scores.shape[-1]]
            scores = jnp.where(looked_into | around, scores, -jnp.inf)
        if self.extra:
            return (keep_best(scores, most) | ends) & live
        first = jnp.arange(live.shape[-1], dtype=jnp.int32)[None, None] == 0
        rank = jnp.where(ends, jnp.where(first, 1e30, 2e30), scores)  # the end before the sink
        return keep_best(jnp.where(live, rank, -jnp.inf), most)

    def _of_groups(
        self, q: Array, bounds: Array, count: Array, groups: int
    ) -> tuple[Array, Array]:  # fmt: skip
        """Scores of clusters for the heads that share them, [K/C, B, M], and which are in use.

        Of several query heads the mean of their softmax is wanted, so that one of large products
        does not decide alone; its logarithm is taken, in which nothing vanishes.
        """
        scores = score_bounds(q, bounds, count, rep=self.rep, alpha=self.alpha)  # [B, H, M]
        scores = jnp.swapaxes(scores, 0, 1).reshape(groups, -1, *scores.shape[::2])
        live = count[:: count.shape[0] // groups] > 0
        if scores.shape[1] == 1:
            return scores[:, 0], live
        scores = scores * q.shape[-1] ** -0.5
        total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        scores = scores - jnp.where(total > -jnp.inf, total, 0.0)
        return jax.nn.logsumexp(scores, axis=1), live

    def _ends(self, count: Array, size: int) -> Array:
        """The first and the last page of each row, bool[K/C, B, M]."""
        entry = jnp.arange(count.shape[-1], dtype=jnp.int32)[None, None]
        used = jnp.sum(count > 0, axis=-1, dtype=jnp.int32)[..., None]
        last = entry == used - 1
        if self.extra:
            length = jnp.sum(count, axis=-1, dtype=jnp.int32)[..., None]
            last = last & (length % (size * self.fan) != 0)
        return ((entry == 0) | last) & (count > 0)

    def read(
        self, q: Array, pool: KVPool, layer: Array, pages: Array, length: Array, tokens: Array,
        before: Read,
    ) -> Read:  # fmt: skip
        """What a step reads in a layer: as its leader, or as it chooses; see `choose`.

        Args:
            q: as in `choose`, and so on.
            pool: as there.
            layer: as there.
            pages: as there.
            length: as there.
            tokens: as there.
            before: what the layer before reads; its W is how many pages there is room for.
        """
        group = layer // pool.k.shape[1]

        def anew(_: Read) -> Read:
            chosen = self.choose(q, pool, layer, pages, length, tokens)
            return pack(chosen, length[group], pool.k.shape[3], before.entry.shape[-1])

        layers = pages.shape[0] * pool.k.shape[1]
        leaders = self.leader_layers(len(self.leaders) or layers)
        if leaders == tuple(range(len(leaders))):
            return anew(before)
        leads = jnp.asarray(leaders, jnp.int32)[layer] == layer
        return jax.lax.cond(leads, anew, lambda same: same, before)


def _any_of(x: Array, fan: int) -> Array:
    """Whether any of each `fan` entries is set, bool[..., ceil(M / fan)]."""
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % fan)]
    return jnp.any(jnp.pad(x, pad).reshape(*x.shape[:-1], -1, fan), axis=-1)


def pack(chosen: Array, length: Array, page_size: int, width: int) -> Read:
    """Chosen pages, bool[K/C, B, M], as entries, in their order; the first `width` if there are
    more. Only the last page of a row may be partly filled, and it stays last.
    """  # fmt: skip
    entry = jnp.broadcast_to(jnp.arange(chosen.shape[-1], dtype=jnp.int32), chosen.shape)
    order = jnp.argsort(~chosen, axis=-1, stable=True)[..., :width].astype(jnp.int32)
    taken = jnp.take_along_axis(chosen, order, axis=-1)
    filled = jnp.clip(length[..., None] - entry * page_size, 0, page_size)
    filled = jnp.where(taken, jnp.take_along_axis(filled, order, axis=-1), 0)
    entry = jnp.where(taken, order, chosen.shape[-1])
    return Read(entry, jnp.sum(filled, axis=-1, dtype=jnp.int32))


def published_sharing(layers: int) -> tuple[int, ...]:
    """Leaders by the authors' rule: the first two and last two layers go by themselves, of the
    others every odd layer by the one before.

    >>> published_sharing(8)
    (0, 1, 2, 2, 4, 4, 6, 7)
    """
    paired = range(2, layers - 2)
    return tuple(i - 1 if i in paired and i % 2 else i for i in range(layers))


def calibrate_sharing(
    view: View, policy: MPCache, tokens: Array, *, least: float = 0.8
) -> tuple[int, ...]:
    """Leaders found on some prompts: a layer goes by the last leader whose pages are its own.

    Call it outside of jit, on a few prompts like those to come: it needs no labels. The paper saw
    that neighbours have more than 80 % of their choices in common, but where depends on the model.

    Args:
        view: of the cache; its pool with bounds.
        policy: whose leaders are wanted.
        tokens: int32[B], how many a step reads.
        least: of a layer's choice, the mean share that must be its leader's too.
    """
    alone = dataclasses.replace(policy, leaders=())
    q, table = view.seen.q[:, :, -1], view.table
    chosen = [
        alone.choose(q[i], view.pool, jnp.int32(i), table.pages, table.length, tokens)
        for i in range(view.shape[0])
    ]
    leaders: list[int] = []
    for layer, own in enumerate(chosen):
        last = leaders[-1] if leaders else layer
        common = jnp.sum(own & chosen[last], dtype=jnp.float32) / jnp.sum(own, dtype=jnp.float32)
        leaders.append(last if leaders and float(common) >= least else layer)
    return tuple(leaders)
