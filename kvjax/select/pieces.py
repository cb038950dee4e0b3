"""What the selections share: the best of some scores, slots that always stay, smoothing."""

import jax
import jax.numpy as jnp

from kvjax.select.view import View

__all__ = ["ends_and_best", "keep_best", "recent", "smooth"]

Array = jax.Array


def keep_best(scores: Array, count: Array) -> Array:
    """The `count` largest along the last axis; of equal ones the first. -inf is never kept.

    Args:
        scores: float32[..., S].
        count: int32[...].

    Returns:
        bool[..., S].
    """
    order = jnp.argsort(-scores, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return (rank < count[..., None]) & (scores > -jnp.inf)


def recent(view: View, count: Array) -> Array:
    """The last `count` slots in use, bool[L, K, B, S]; count is int32[L, K, B]."""
    return view.live & (view.slot >= (view.length - count)[..., None])


def ends_and_best(
    view: View, scores: Array, count: Array, *, sinks: int = 0, last: int = 0
) -> Array:
    """The first `sinks` tokens, the last `last` ones and the best of the others.

    Where they do not fit the budget, the last ones stay, then the first.

    Args:
        view: of the cache.
        scores: float32[L, K, B, S]; those of slots not in use do not matter.
        count: int32[L, K, B], tokens kept in all.
        sinks: how many of the first always stay.
        last: how many of the last always stay.

    Returns:
        bool[L, K, B, S].
    """
    count = jnp.minimum(count, view.length)
    end = jnp.minimum(count, last)
    front = jnp.minimum(count - end, sinks)
    fixed = recent(view, end) | (view.slot < front[..., None])
    scores = jnp.where(view.live & ~fixed, scores, -jnp.inf)
    fixed = fixed & view.live
    left = count - jnp.sum(fixed, axis=-1, dtype=jnp.int32)
    return fixed | keep_best(scores, left)


def smooth(scores: Array, size: int, kind: str = "mean") -> Array:
    """Each score replaced by the mean (zeros beyond the ends) or maximum of its neighbourhood.

    Args:
        scores: float32[..., S].
        size: tokens of a neighbourhood, odd; 1 changes nothing.
        kind: "mean" or "max".
    """
    if size % 2 != 1 or kind not in ("mean", "max"):
        raise ValueError(f"{size=} {kind=}: smooth over an odd number of tokens, by mean or max")
    empty = 0.0 if kind == "mean" else -jnp.inf
    pad = [(0, 0)] * (scores.ndim - 1) + [(size // 2, size // 2)]
    padded = jnp.pad(scores, pad, constant_values=empty)
    parts = [padded[..., i : i + scores.shape[-1]] for i in range(size)]
    stacked = jnp.stack(parts)
    return jnp.mean(stacked, axis=0) if kind == "mean" else jnp.max(stacked, axis=0)
