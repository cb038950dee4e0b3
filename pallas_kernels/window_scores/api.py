"""The contract of `window_scores`."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.devices import default_device, on_hopper
from kvjax.pallas_kernels.window_scores.reference import (
    slots,
    summarize,
    token_scores_reference,
)
from kvjax.pallas_kernels.window_scores.tpu import token_scores_tpu

__all__ = ["window_scores"]

Array = jax.Array


class Keys(Protocol):
    """What the scores read of a pool; `kvjax.cache.KVPool` is one."""

    @property
    def k(self) -> Array:
        """[N, R, C, P, D]."""
        ...

    @property
    def position(self) -> Array | None:
        """int32[N, P] true positions, -1 for a dead slot; None: a slot's index is its position."""
        ...


def window_scores(
    q: Array,
    lse: Array,
    pool: Keys,
    layer: Array,
    pages: Array,
    end: Array,
    query_position: Array,
    *,
    window: int = 1,
    top: int | None = None,
    over_heads: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Attention that some queries of each row pay to its tokens, summed over the queries.

    With the logarithm of the softmax's sum given, a token's weight depends on nothing but its key:
    keys are read once and no square of queries and keys is kept.

    Args:
        q: [B, A, H, D], rotated, such as those of the last A positions.
        lse: float32[B, A, H], from the attention that the queries took part in.
        pool: pages of keys, [N, R, C, P, D].
        layer: int32 scalar of L.
        pages: int32[L/R, K/C, B, M], the table; N or above: no page.
        end: int32[L/R, K/C, B]; slots from there on are not scored.
        query_position: int32[B, A] true positions; -1 for a query that is padding.
        window: tokens that are scored together, from slot 0 on; the last window may be shorter.
        top: a window's score is the mean of so many of its largest tokens; None: of all.
        over_heads: return the mean over the query heads.
        scale: of the products; None: D ** -0.5.
        implementation: "reference", "gpu", "tpu", or None for the best that the default device
            can run.

    Returns:
        float32[B, H, W], or [B, W] over heads, for W = ceil(M * P / window) windows; 0 where
        nothing is scored. With window=1 these are the tokens' own sums.

    Raises:
        ValueError: shapes do not fit each other.
        NotImplementedError: no such implementation here, or it cannot do this.
    """
    heads = pages.shape[1] * pool.k.shape[2]
    if q.ndim != 4 or q.shape[2] % heads or q.shape[3] != pool.k.shape[-1]:
        raise ValueError(f"{q.shape=} does not fit {pool.k.shape=} and {pages.shape=}")
    if lse.shape != q.shape[:3] or query_position.shape != q.shape[:2]:
        raise ValueError(f"{lse.shape=} {query_position.shape=} do not fit {q.shape=}")
    if window < 1 or (top is not None and not 1 <= top <= window):
        raise ValueError(f"{window=} {top=}: a window has 1 token or more, and top at most all")
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    group = layer // pool.k.shape[1]
    pages, end = pages[group], end[group]
    live, position = slots(pool, pages, end)
    tokens = _token_scores(
        q, lse, pool, layer, pages, end, live, position, query_position, scale, implementation
    )
    live = jnp.repeat(live, q.shape[2] // live.shape[0], axis=0)  # [H, B, S]
    scores = summarize(tokens, jnp.swapaxes(live, 0, 1), window, top)
    return jnp.mean(scores, axis=1) if over_heads else scores


def _token_scores(
    q: Array, lse: Array, pool: Keys, layer: Array, pages: Array, end: Array, live: Array,
    position: Array, query_position: Array, scale: float, implementation: str | None,
) -> Array:  # fmt: skip
    """Float32[B, H, S] by the implementation, or by the reference where none is named."""
    best = implementation or _best()
    kernel = {"gpu": _gpu, "tpu": token_scores_tpu}.get(best)
    if kernel is not None:
        try:
            return kernel(q, lse, pool, layer, pages, end, query_position, position, scale)
        except NotImplementedError:
            if implementation is not None:
                raise
    elif best != "reference":
        raise NotImplementedError(f"window_scores has no {implementation=}")
    return token_scores_reference(q, lse, pool, layer, pages, live, position, query_position, scale)


def _best() -> str:
    """The implementation for the default device, as known when a function is traced."""
    if on_hopper():
        return "gpu"
    return "tpu" if default_device().platform == "tpu" else "reference"


def _gpu(q: Array, *arguments: Any) -> Array:
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"window_scores on a GPU with jax {jax.__version__}: it needs 0.11"
        )
    from kvjax.pallas_kernels.window_scores.gpu import token_scores_gpu

    return token_scores_gpu(q, *arguments)
