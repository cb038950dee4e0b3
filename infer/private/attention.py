"""One query's attention over a secret cache: all of it, or the clusters that it chooses.

Letters: H heads, D head size, n cached tokens, s tokens a cluster, C = n/s clusters, k chosen.
Keys and values are [H, n, D] and already rotated. Queries are [H, D], rotated and already divided
by sqrt(D): who owns the weights scales those once, which costs nothing.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvjax.infer.private.arithmetic import (
    engine_top_k,
    fold_queries,
    integer_product,
    rank_top_k,
    softmax_parts,
)

__all__ = [
    "OURS",
    "PUBLISHED",
    "Choice",
    "Tail",
    "attend",
    "attend_chosen",
    "choose",
    "representatives",
]

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """How clusters are chosen and read.

    Attributes:
        clusters: how many are read (k).
        size: tokens a cluster (s).
        alpha: weight of the largest key entries in a cluster's representative (equation 7).
        select: "rank" compares all pairs at once and opens nothing; "top_k" is the engine's own.
        gather: "kv" fetches the chosen keys and values, as published; "scores" fetches their
            scores, and puts their weights back before the product with all values: the same
            result, where a product costs by its output (ABY3) with far fewer bytes.
        fold: so many heads share a matrix product, for fewer rounds and as many times the local
            work.
    """

    clusters: int
    size: int = 16
    alpha: float = 0.6
    select: str = "rank"
    gather: str = "scores"
    fold: int = 4


PUBLISHED = Choice(clusters=1, select="top_k", gather="kv", fold=1)
"""As in Zeng et al. 2025, with `clusters` still to be replaced."""
OURS = Choice(clusters=1)
"""What is cheapest in rounds and bytes under ABY3, with `clusters` still to be replaced."""


def representatives(keys: Array, size: int, alpha: float) -> Array:
    """Each cluster's one vector (MPCache, equation 7): [H, C, D] of keys [H, n, D].

    alpha times the largest entries plus 1 - alpha times the smallest, dimension by dimension. The
    comparisons are made once, when the prompt is read.
    """
    heads, n, dim = keys.shape
    parts = keys.reshape(heads, n // size, size, dim)
    return alpha * jnp.max(parts, axis=2) + (1 - alpha) * jnp.min(parts, axis=2)


def _scores(q: Array, keys: Array, fold: int) -> Array:
    """Scores of [H, D] and [H, n, D]: [H, n]."""
    heads, n, dim = keys.shape
    if (fold := math.gcd(fold, heads)) == 1:
        return jnp.einsum("hd,hnd->hn", q, keys)
    columns = keys.transpose(0, 2, 1).reshape(heads // fold, fold * dim, n)
    return jnp.einsum("gad,gdn->gan", fold_queries(q[:, None], fold), columns).reshape(heads, n)


def _weighted(weights: Array, values: Array, fold: int) -> Array:
    """[H, n] times [H, n, D]: [H, D]."""
    heads, n, dim = values.shape
    if (fold := math.gcd(fold, heads)) == 1:
        return jnp.einsum("hn,hnd->hd", weights, values)
    rows = values.reshape(heads // fold, fold * n, dim)
    return jnp.einsum("gan,gnd->gad", fold_queries(weights[:, None], fold), rows).reshape(heads, -1)


Tail = tuple[Array, Array, Array]
"""Keys [H, t, D], values [H, t, D], and public bool[t]: a false entry is an empty place."""


def attend(
    q: Array, keys: Array, values: Array, *, fold: int = 1, tail: Tail | None = None
) -> Array:
    """Attention over everything, the tail included: [H, D]."""

    def product(weights: Array) -> Array:
        return _weighted(weights, values, fold)

    return _finish(q, _scores(q, keys, fold), product, values.shape[-1], fold, tail)


def _finish(
    q: Array, scores: Array, product: Callable[[Array], Array], dim: int, fold: int,
    tail: Tail | None,
) -> Array:  # fmt: skip
    """Softmax over scores [H, n] and a tail's, and the products of its weights with values."""
    if tail is None:
        return _normed(*softmax_parts(scores), product, dim)
    kept, new = scores.shape[1], _scores(q, tail[0], fold)
    # An empty place must not win the maximum: it takes the first score's place.
    new = jnp.where(tail[2][None], new, jnp.broadcast_to(scores[:, :1], new.shape))
    real = jnp.concatenate([jnp.ones((kept,), bool), tail[2]])[None]
    scores = jnp.concatenate([scores, new], axis=1)

    def both(weights: Array) -> Array:
        return product(weights[:, :kept]) + _weighted(weights[:, kept:], tail[1], fold)

    return _normed(*softmax_parts(scores, jnp.broadcast_to(real, scores.shape)), both, dim)


def _normed(weights: Array, inverse: Array, product: Callable[[Array], Array], dim: int) -> Array:
    """A softmax's product with values, divided where fewer numbers are to be divided."""
    if weights.shape[-1] < dim:
        return product(weights * inverse)
    return product(weights) * inverse


def choose(q: Array, vectors: Array, choice: Choice) -> Array:
    """The clusters that a query reads, one-hot: int32[H, k, C]; vectors as `representatives`."""
    select: Callable[[Array, int], Array] = rank_top_k if choice.select == "rank" else engine_top_k
    return select(_scores(q, vectors, choice.fold), choice.clusters)


def attend_chosen(
    q: Array, keys: Array, values: Array, chosen: Array, choice: Choice,
    tail: Tail | None = None,
) -> Array:  # fmt: skip
    """Attention over the chosen clusters and a tail that is always read: [H, D].

    Args:
        q: [H, D].
        keys: [H, n, D].
        values: [H, n, D].
        chosen: from `choose`, of this layer or of the one before it.
        choice: how they are read.
        tail: tokens that are read in any case.
    """
    read = _gather_scores if choice.gather == "scores" else _gather_keys
    scores, expand = read(q, keys, values, chosen, choice)
    return _finish(q, scores, expand, values.shape[-1], choice.fold, tail)


Read = tuple[Array, Callable[[Array], Array]]


def _gather_keys(q: Array, keys: Array, values: Array, chosen: Array, choice: Choice) -> Read:
    """Fetches the chosen keys and values (MPCache, section 3.4): cost by k * s * D."""
    heads, n, dim = keys.shape

    def fetch(x: Array) -> Array:
        flat = x.reshape(heads, n // choice.size, choice.size * dim)
        return integer_product(chosen, flat).reshape(heads, -1, dim)

    held = fetch(values)
    return _scores(q, fetch(keys), choice.fold), lambda w: _weighted(w, held, choice.fold)


def _gather_scores(q: Array, keys: Array, values: Array, chosen: Array, choice: Choice) -> Read:
    """Fetches the chosen scores, and puts weights back: cost by n and k * s, not by D."""
    heads, n, _ = keys.shape
    k, clusters = chosen.shape[1:]
    scores = _scores(q, keys, choice.fold).reshape(heads, clusters, choice.size)
    picked = _pick(chosen, scores, choice.fold).reshape(heads, -1)

    def expand(weights: Array) -> Array:
        parts = weights.reshape(heads, k, choice.size)
        full = _pick(chosen.swapaxes(1, 2), parts, choice.fold)
        return _weighted(full.reshape(heads, n), values, choice.fold)

    return picked, expand


def _pick(chosen: Array, x: Array, fold: int) -> Array:
    """Rows of [H, n, d] by one-hot int32[H, m, n]: [H, m, d]."""
    heads, n, d = x.shape
    if (fold := math.gcd(fold, heads)) == 1:
        return integer_product(chosen, x)
    rows = x.reshape(heads // fold, fold * n, d)
    return integer_product(fold_queries(chosen, fold), rows).reshape(heads, -1, d)
