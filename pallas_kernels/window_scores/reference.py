"""The oracle of `window_scores`: plain JAX, float32 throughout, and the way on the CPU.

Which slots count, and windows from tokens, is the same for all implementations.

Queries are taken a block at a time, so that a whole prompt of them (H2O) needs no square of scores.

Letters beside those of the contract: J = K/C head groups, G = H/K query heads a KV head,
S = M * P slots, W windows.
"""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["slots", "summarize", "token_scores_reference"]

Array = jax.Array

_BLOCK_QUERIES = 32


def slots(pool: Any, pages: Array, end: Array) -> tuple[Array, Array]:
    """Which slots count, bool[J, B, S], and their positions, int32[J, B, S].

    Args:
        pool: as in `api.window_scores`.
        pages: int32[J, B, M], of the layer's group.
        end: int32[J, B], likewise.
    """
    n, p = pool.k.shape[0], pool.k.shape[3]
    j, b, m = pages.shape
    slot = jnp.arange(m * p, dtype=jnp.int32)[None, None]
    live = jnp.repeat(pages < n, p, axis=-1) & (slot < end[..., None])
    if pool.position is None:
        return live, jnp.broadcast_to(slot, live.shape)
    position = pool.position[jnp.minimum(pages, n - 1)].reshape(j, b, m * p)
    return live & (position >= 0), position


def token_scores_reference(
    q: Array, lse: Array, pool: Any, layer: Array, pages: Array, live: Array, position: Array,
    query_position: Array, scale: float,
) -> Array:  # fmt: skip
    """What the queries pay to each slot in all, float32[B, H, S].

    Args:
        q: as in `api.window_scores`, and so on.
        lse: as there.
        pool: as there.
        layer: as there.
        pages: int32[J, B, M], of the layer's group.
        live: of `slots`.
        position: likewise.
        query_position: as there.
        scale: as there.
    """
    keys = _keys(pool, layer, pages)
    return _token_scores(q, lse, keys, live, position, query_position, scale)


def _keys(pool: Any, layer: Array, pages: Array) -> Array:
    """float32[J, B, C, S, D]."""
    n, r, c, p, d = pool.k.shape
    j, b, m = pages.shape
    page = jnp.minimum(pages, n - 1)
    head = jnp.arange(c, dtype=jnp.int32)[None, None, :, None]
    keys = pool.k[page[:, :, None], layer % r, head].reshape(j, b, c, m * p, d)
    return keys.astype(jnp.float32)


def _token_scores(
    q: Array, lse: Array, keys: Array, live: Array, position: Array, query_position: Array,
    scale: float,
) -> Array:  # fmt: skip
    """Sums over the queries, float32[B, H, S]."""
    (b, a, h, _), (j, _, c, s, _) = q.shape, keys.shape
    size = min(_BLOCK_QUERIES, a)
    pad = -a % size
    q = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, pad), (0, 0), (0, 0)))
    lse = jnp.pad(lse, ((0, 0), (0, pad), (0, 0)))
    query_position = jnp.pad(query_position, ((0, 0), (0, pad)), constant_values=-1)

    def block(i: Array, total: Array) -> Array:
        some = (jax.lax.dynamic_slice_in_dim(x, i * size, size, 1) for x in (q, lse))
        q_block, lse_block = (
            jnp.moveaxis(x.reshape(b, size, j, c, h // (j * c), *x.shape[3:]), 1, 4) for x in some
        )  # [B, J, C, G, A, ...]
        place = jax.lax.dynamic_slice_in_dim(query_position, i * size, size, 1)
        score = jnp.einsum("bjcgad,jbcsd->bjcgas", q_block, keys, precision="highest") * scale
        seen = live[:, :, None] & (position[:, :, None] <= place[None, :, :, None])
        seen = jnp.moveaxis(seen, 0, 1)[:, :, None, None]  # [B, J, 1, 1, A, S]
        weight = jnp.where(seen, jnp.exp(score - lse_block[..., None]), 0.0)
        return total + jnp.sum(weight, axis=4)

    total = jnp.zeros((b, j, c, h // (j * c), s), jnp.float32)
    return jax.lax.fori_loop(0, (a + pad) // size, block, total).reshape(b, h, s)


def summarize(tokens: Array, live: Array, window: int, top: int | None) -> Array:
    """Scores of windows from those of tokens: the mean of all, or of the `top` largest.

    Args:
        tokens: float32[..., S].
        live: bool[..., S], which of them count; others may hold anything.
        window: tokens each.
        top: how many of a window's tokens count; None is all. A window with fewer has their mean.

    Returns:
        float32[..., W], 0 for a window without tokens.
    """
    pad = [(0, 0)] * (tokens.ndim - 1) + [(0, -tokens.shape[-1] % window)]
    live = jnp.pad(jnp.broadcast_to(live, tokens.shape), pad)
    tokens = jnp.where(live, jnp.pad(tokens, pad), 0.0)
    tokens, live = (x.reshape(*x.shape[:-1], -1, window) for x in (tokens, live))
    count = jnp.sum(live, axis=-1, dtype=jnp.int32)
    if top is not None and top < window:
        # No weight is negative, so a dead token's 0 adds nothing even where it is among the top.
        tokens, count = jax.lax.top_k(tokens, top)[0], jnp.minimum(count, top)
    return jnp.sum(tokens, axis=-1) / jnp.maximum(count, 1).astype(jnp.float32)
