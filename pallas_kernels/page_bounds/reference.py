"""`page_bounds` in plain JAX. Letters as in `api`; G = H/K query heads a KV head."""

import jax
import jax.numpy as jnp

__all__ = ["REPRESENTATIONS", "append", "gather_bounds", "merge_pages", "rebuild", "score_bounds"]

Array = jax.Array

REPRESENTATIONS = ("linear_minmax", "mean", "exact_bound")


def append(bounds: Array, layer: Array, k: Array, page: Array, offset: Array) -> Array:
    """See `api.append_bounds`."""
    num_pages, r, c, _, d = bounds.shape
    keys = jnp.moveaxis(k.astype(jnp.float32).reshape(-1, page.shape[0], c, d), 1, 0)  # [J,T,C,D]
    head = jnp.arange(c, dtype=jnp.int32)[None, None]
    inner = layer % r
    begun = jnp.where(offset == 0, page, num_pages)[..., None]
    bounds = bounds.at[begun, inner, head].set(_empty(d), mode="drop")
    place = page[..., None], inner, head
    bounds = bounds.at[(*place, 0)].min(keys, mode="drop")
    bounds = bounds.at[(*place, 1)].max(keys, mode="drop")
    return bounds.at[(*place, 2)].add(keys, mode="drop")


def _empty(d: int) -> Array:
    """Bounds of no key, float32[3, D]."""
    start = jnp.asarray([jnp.inf, -jnp.inf, 0.0], jnp.float32)
    return jnp.broadcast_to(start[:, None], (3, d))


def rebuild(k: Array, bounds: Array | None, pages: Array, length: Array) -> Array:
    """See `api.rebuild_bounds`."""
    n, r, c, p, d = k.shape
    if bounds is None:
        bounds = jnp.zeros((n, r, c, 3, d), jnp.float32)
    count = filled(length, pages.shape[-1], p)
    keys = k[jnp.minimum(pages, n - 1)].astype(jnp.float32)  # [L/R, J, B, M, R, C, P, D]
    slot = jnp.arange(p, dtype=jnp.int32)
    live = jnp.broadcast_to(slot, (*count.shape, p)) < count[..., None]
    live = live[..., None, None, :, None]
    parts = [
        jnp.min(jnp.where(live, keys, jnp.inf), axis=-2),
        jnp.max(jnp.where(live, keys, -jnp.inf), axis=-2),
        jnp.sum(jnp.where(live, keys, 0.0), axis=-2),
    ]
    target = jnp.where(count > 0, pages, n)
    return bounds.at[target].set(jnp.stack(parts, axis=-2), mode="drop")


def filled(length: Array, entries: int, page_size: int) -> Array:
    """Tokens in each entry of a row, int32[..., M], for lengths int32[...]."""
    first = jnp.arange(entries, dtype=jnp.int32) * page_size
    first = jnp.broadcast_to(first, (*length.shape, entries))
    return jnp.clip(length[..., None] - first, 0, page_size)


def gather_bounds(
    bounds: Array, layer: Array, pages: Array, length: Array, page_size: int
) -> tuple[Array, Array]:
    """The bounds of each row's pages, float32[K, B, M, 3, D], and their tokens, int32[K, B, M]."""
    n, r, c, _, d = bounds.shape
    pages, length = pages[layer // r], length[layer // r]
    j, b, m = pages.shape
    count = jnp.where(pages < n, filled(length, m, page_size), 0)
    head = jnp.arange(c, dtype=jnp.int32)[None, :, None, None]
    found = bounds[jnp.minimum(pages, n - 1)[:, None], layer % r, head]  # [J, C, B, M, 3, D]
    return found.reshape(j * c, b, m, 3, d), jnp.repeat(count, c, axis=0)


def merge_pages(bounds: Array, count: Array, fan: int) -> tuple[Array, Array]:
    """The bounds of each `fan` pages together: [..., ceil(M / fan), 3, D], and their tokens."""
    pad = -bounds.shape[-3] % fan
    seen = (count > 0)[..., None, None]
    empty = jnp.broadcast_to(_empty(bounds.shape[-1]), bounds.shape)
    bounds = jnp.concatenate([jnp.where(seen, bounds, empty), empty[..., :pad, :, :]], axis=-3)
    count = jnp.pad(count, [(0, 0)] * (count.ndim - 1) + [(0, pad)])
    bounds = bounds.reshape(*bounds.shape[:-3], -1, fan, *bounds.shape[-2:])
    least, most, total = (bounds[..., i, :] for i in range(3))
    parts = [jnp.min(least, axis=-2), jnp.max(most, axis=-2), jnp.sum(total, axis=-2)]
    merged = jnp.stack(parts, axis=-2)
    return merged, jnp.sum(count.reshape(*count.shape[:-1], -1, fan), axis=-1, dtype=jnp.int32)


def score_bounds(q: Array, bounds: Array, count: Array, *, rep: str, alpha: float) -> Array:
    """Scores of pages whose bounds are at hand.

    Args:
        q: [B, H, D].
        bounds: float32[K, B, M, 3, D].
        count: int32[K, B, M], tokens of each page.
        rep: as in `api.page_scores`.
        alpha: likewise.

    Returns:
        float32[B, H, M], -inf for pages without tokens.
    """
    kv_heads, rows = bounds.shape[:2]
    q = q.astype(jnp.float32).reshape(rows, kv_heads, -1, q.shape[-1])  # [B, K, G, D]
    live = count > 0
    bounds = jnp.where(live[..., None, None], bounds, 0.0)
    least, most, total = (bounds[..., i, :] for i in range(3))
    if rep == "exact_bound":  # the coordinates above 0 meet the largest, the others the least
        scores = _products(jnp.maximum(q, 0.0), most) + _products(jnp.minimum(q, 0.0), least)
    elif rep == "mean":
        scores = _products(q, total / jnp.maximum(count, 1)[..., None].astype(jnp.float32))
    else:
        scores = _products(q, alpha * most + (1 - alpha) * least)
    scores = jnp.where(jnp.swapaxes(live, 0, 1)[:, :, None], scores, -jnp.inf)
    return scores.reshape(rows, -1, scores.shape[-1])


def _products(q: Array, keys: Array) -> Array:
    return jnp.einsum("bkgd,kbmd->bkgm", q, keys, precision="highest")
