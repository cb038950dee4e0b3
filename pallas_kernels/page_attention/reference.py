"""The oracle of `page_attention`: plain JAX, float32 throughout, and the way on the CPU.

It walks over the items in blocks, so that its time follows the items in use and not the room there
is for them, and merges each block into its queries' results.

Letters beside those of the contract: E items of a block, Q queries an item, S pages an item,
J = K/C head groups.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.devices import default_device
from kvjax.pallas_kernels.page_attention.merge import finish, guard, scatter_merge
from kvjax.pallas_kernels.page_attention.work import Items, Pages, WorkList

__all__ = ["page_attention_reference"]

Array = jax.Array

# Bytes of keys and values that a block of items reads. On a CPU a core's cache must hold them; an
# accelerator wants much to do at a time, and a GPU's host must be asked after each turn of a loop.
_CPU_BLOCK_BYTES, _BLOCK_BYTES = 2**21, 2**28


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What a score goes through."""

    window: Array | None
    soft_cap: float | None
    scale: float


class _Keys(NamedTuple):
    """The keys that a block of items reads."""

    page: Array  # int32[J, E, S]
    live: Array  # bool[J, E, S * P]
    position: Array  # int32[J, E, S * P]


def page_attention_reference(
    q: Array, pool: Pages, layer: Array, work: WorkList,
    window: Array | None, soft_cap: float | None, scale: float,
) -> tuple[Array, Array]:  # fmt: skip
    """See `api.page_attention`."""
    rule = _Rule(window, soft_cap, scale)
    out = jnp.zeros(q.shape, jnp.float32)
    lse = jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    most = _CPU_BLOCK_BYTES if default_device().platform == "cpu" else _BLOCK_BYTES
    for items in work.items:
        size = max(1, min(most // _item_bytes(pool, items), items.index.shape[0]))

        def block(
            i: Array, carry: tuple[Array, Array], items: Items = items, size: int = size
        ) -> tuple[Array, Array]:
            index, used = _block_of(items, i, size)
            part = _attend(q, pool, layer, work, items, index, used, rule)
            return scatter_merge(*carry, *part)

        if size == items.index.shape[0]:
            out, lse = block(jnp.int32(0), (out, lse))
        else:
            out, lse = jax.lax.fori_loop(0, -(-items.count // size), block, (out, lse))
    return out.astype(q.dtype), lse


def _item_bytes(pool: Pages, items: Items) -> int:
    """Of the keys and values of one item, as float32."""
    heads, page_size, head_dim = pool.k.shape[2:]
    return 2 * 4 * items.max_pages * heads * page_size * head_dim


def _block_of(items: Items, i: Array, size: int) -> tuple[Array, Array]:
    """The i-th `size` items, int32[E, 5], and which of them are in use, bool[E]."""
    number = i * size + jnp.arange(size, dtype=jnp.int32)
    return items.index[jnp.minimum(number, items.index.shape[0] - 1)], number < items.count


def _attend(
    q: Array, pool: Pages, layer: Array, work: WorkList, items: Items, index: Array, used: Array,
    rule: _Rule,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Attention of each item by itself: queries int32[E * Q], out [E * Q, H, D], lse [E * Q, H]."""
    (t, h, d), (_, r, c, _, _) = q.shape, pool.k.shape
    query = index[:, 3, None] + jnp.arange(items.max_queries, dtype=jnp.int32)[None]  # [E, Q]
    query = jnp.where((query < index[:, 4, None]) & used[:, None], query, t)
    q_position = work.query_position.at[query].get(mode="fill", fill_value=-1)
    keys = _keys(pool, work, layer // r, items.max_pages, index)
    seen = _seen(keys, q_position, rule)

    # Heads and queries of a KV head side by side: one matrix product per item and KV head.
    j, e, n = keys.page.shape[0], *query.shape
    block = q.at[query].get(mode="fill", fill_value=0).astype(jnp.float32)
    block = block.reshape(e, n, j, c, h // (j * c), d).transpose(2, 0, 3, 4, 1, 5)
    block = block.reshape(j, e, c, -1, d)  # [J, E, C, G * Q, D]
    k = _read(pool.k, layer % r, keys.page)
    # Dead slots may hold NaN: a masked score is not enough, since 0 * NaN is NaN.
    v = jnp.where(keys.live[:, :, None, :, None], _read(pool.v, layer % r, keys.page), 0.0)
    out, lse = _softmax(block, k, v, seen, rule)
    out = out.reshape(j, e, c, -1, n, d).transpose(1, 4, 0, 2, 3, 5)  # [E, Q, J, C, G, D]
    lse = lse.reshape(j, e, c, -1, n).transpose(1, 4, 0, 2, 3)
    return query.reshape(-1), out.reshape(-1, h, d), lse.reshape(-1, h)


def _keys(pool: Pages, work: WorkList, group: Array, max_pages: int, index: Array) -> _Keys:
    num_pages, size = pool.k.shape[0], pool.k.shape[3]
    row, first, end = index[:, 0], index[:, 1, None], index[:, 2, None]
    entry = first + jnp.arange(max_pages, dtype=jnp.int32)[None]  # [E, S]
    clipped = jnp.minimum(entry, work.pages.shape[-1] - 1)
    page = work.pages[group][:, row[:, None], clipped]  # [J, E, S]
    live = (entry < end)[None] & (page < num_pages)
    page = jnp.minimum(page, num_pages - 1)
    slot = (entry[..., None] * size + jnp.arange(size, dtype=jnp.int32)[None, None])[None]
    live = live[..., None] & (slot < work.length[group][:, row][..., None, None])
    position = jnp.broadcast_to(slot, live.shape)
    if pool.position is not None:
        position = pool.position[page]
        live = live & (position >= 0)
    flat = (*page.shape[:2], -1)
    return _Keys(page, live.reshape(flat), position.reshape(flat))


def _seen(keys: _Keys, q_position: Array, rule: _Rule) -> Array:
    """Which key each query sees, bool[J, E, Q, S * P]."""
    query, key = q_position[None, :, :, None], keys.position[:, :, None]
    seen = keys.live[:, :, None] & (key <= query)
    if rule.window is not None:
        seen = seen & ((rule.window == 0) | (key > query - rule.window))
    return seen


def _read(plane: Array, inner: Array, page: Array) -> Array:
    """Pages as keys or values of one layer, float32[J, E, C, S * P, D]."""
    c, d = plane.shape[2], plane.shape[4]
    head = jnp.arange(c, dtype=jnp.int32)[None, None, :, None]
    tokens = plane[page[:, :, None], inner, head]  # [J, E, C, S, P, D]
    return tokens.reshape(*page.shape[:2], c, -1, d).astype(jnp.float32)


def _softmax(q: Array, k: Array, v: Array, seen: Array, rule: _Rule) -> tuple[Array, Array]:
    """Q [J, E, C, G * Q, D], k and v [J, E, C, S * P, D], seen [J, E, Q, S * P]: out and lse."""
    # Turned first: XLA's CPU products of few rows take twice as long over the last axes of both.
    k = jnp.swapaxes(k, -1, -2)
    score = jnp.einsum("jecmd,jecds->jecms", q, k, precision="highest") * rule.scale
    if rule.soft_cap is not None:
        score = rule.soft_cap * jnp.tanh(score / rule.soft_cap)
    seen = jnp.tile(seen, (1, 1, q.shape[3] // seen.shape[2], 1))[:, :, None]
    score = jnp.where(seen, score, -jnp.inf)
    top = guard(jnp.max(score, axis=-1))
    weight = jnp.exp(score - top[..., None])
    summed = jnp.einsum("jecms,jecsd->jecmd", weight, v, precision="highest")
    return finish(summed, jnp.sum(weight, axis=-1), top)
