"""The oracle of `page_attention`: plain JAX, float32 throughout, and the way on the CPU.

It walks over the items in blocks, so that its time follows the items in use and not the room there
is for them, and merges each block into its queries' results.
"""

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.page_attention.merge import scatter_merge
from kvjax.pallas_kernels.page_attention.work import Items, Pages, WorkList

__all__ = ["page_attention_reference"]

Array = jax.Array

# Queries per block of items: enough for the matrix products, little enough to stay in the cache.
_BLOCK_QUERIES = 32


def page_attention_reference(
    q: Array, pool: Pages, layer: Array, work: WorkList,
    window: Array | None, soft_cap: float | None, scale: float,
) -> tuple[Array, Array]:  # fmt: skip
    """See `api.page_attention`."""
    t, h, d = q.shape
    out, lse = jnp.zeros((t, h, d), jnp.float32), jnp.full((t, h), -jnp.inf, jnp.float32)
    for items in work.items:
        size = max(1, min(_BLOCK_QUERIES // items.max_queries, items.index.shape[0]))

        def block(i: Array, carry: tuple, items: Items = items, size: int = size) -> tuple:
            index, used = _block_of(items, i, size)
            query, part, part_lse = _attend(
                q, pool, layer, work, items, index, used, window, soft_cap, scale
            )
            return scatter_merge(*carry, query, part, part_lse)

        out, lse = jax.lax.fori_loop(0, -(-items.count // size), block, (out, lse))
    return out.astype(q.dtype), lse


def _block_of(items: Items, i: Array, size: int) -> tuple[Array, Array]:
    """The i-th `size` items, int32[E, 5], and which of them are in use, bool[E]."""
    number = i * size + jnp.arange(size, dtype=jnp.int32)
    return items.index[jnp.minimum(number, items.index.shape[0] - 1)], number < items.count


def _attend(
    q: Array, pool: Pages, layer: Array, work: WorkList, items: Items, index: Array, used: Array,
    window: Array | None, soft_cap: float | None, scale: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Attention of each item by itself: queries int32[E*Q], out [E*Q, H, D], lse [E*Q, H]."""
    (t, h, d), (n, r, c, p, _) = q.shape, pool.k.shape
    group, inner = layer // r, layer % r
    row, first_page, end_page, first_query, end_query = jnp.unstack(index, axis=1)

    query = first_query[:, None] + jnp.arange(items.max_queries)[None]  # [E, Q]
    query = jnp.where((query < end_query[:, None]) & used[:, None], query, t)
    q_position = work.query_position.at[query].get(mode="fill", fill_value=-1)

    entry = first_page[:, None] + jnp.arange(items.max_pages)[None]  # [E, S]
    inside = entry < end_page[:, None]
    entry = jnp.minimum(entry, work.pages.shape[-1] - 1)
    page = work.pages[group][:, row[:, None], entry]  # [K/C, E, S]
    inside = inside[None] & (page < n)
    page = jnp.minimum(page, n - 1)
    slot = (entry[..., None] * p + jnp.arange(p)[None, None])[None]  # [1, E, S, P]
    live = inside[..., None] & (slot < work.length[group][:, row][..., None, None])
    key_position = jnp.broadcast_to(slot, live.shape)
    if pool.position is not None:
        key_position = pool.position[page]
        live = live & (key_position >= 0)

    # Dead slots may hold NaN: a masked score is not enough, since 0 * NaN is NaN.
    k = pool.k[page, inner].astype(jnp.float32)  # [K/C, E, S, C, P, D]
    v = pool.v[page, inner].astype(jnp.float32)
    v = jnp.where(live[:, :, :, None, :, None], v, 0.0)
    heads = page.shape[0]
    q_block = q.at[query].get(mode="fill", fill_value=0).astype(jnp.float32)
    q_block = q_block.reshape(*query.shape, heads, c, h // (heads * c), d)  # [E, Q, K/C, C, G, D]

    seen = live[:, :, None] & (
        key_position[:, :, None] <= q_position[None, :, :, None, None]
    )  # [K/C, E, Q, S, P]
    if window is not None:
        start = q_position[None, :, :, None, None] - window
        seen = seen & ((window == 0) | (key_position[:, :, None] > start))
    score = jnp.einsum("eqhcgd,hescpd->hecgqsp", q_block, k, precision="highest") * scale
    if soft_cap is not None:
        score = soft_cap * jnp.tanh(score / soft_cap)
    score = jnp.where(seen[:, :, None, None], score, -jnp.inf)
    top = jnp.max(score, axis=(-2, -1), keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = jnp.exp(score - top)  # [K/C, E, C, G, Q, S, P]
    total = jnp.sum(weight, axis=(-2, -1))
    out = jnp.einsum("hecgqsp,hescpd->eqhcgd", weight, v, precision="highest")
    total = jnp.transpose(total, (1, 4, 0, 2, 3))  # [E, Q, K/C, C, G]
    top = jnp.transpose(top[..., 0, 0], (1, 4, 0, 2, 3))
    some = total > 0
    safe_total = jnp.where(some, total, 1.0)
    out = out / safe_total[..., None]
    lse = jnp.where(some, top + jnp.log(safe_total), -jnp.inf)
    return query.reshape(-1), out.reshape(-1, h, d), lse.reshape(-1, h)
