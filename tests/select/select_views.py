"""Caches for the tests of selections: random queries and keys in pages, as after a prefill."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import KVPool, PageTable
from kvjax.select import Observation, View


def random_arrays(seed=0, rows=2, tokens=37, layers=8, heads=4, kv_heads=2, head_dim=16, sharp=2.0):
    """q [L, B, n, H, D], k and v [L, B, n, K, D] of float32."""
    rng = np.random.default_rng(seed)
    q = sharp * rng.normal(size=(layers, rows, tokens, heads, head_dim))
    k, v = rng.normal(size=(2, layers, rows, tokens, kv_heads, head_dim))
    return tuple(x.astype(np.float32) for x in (q, k, v))


def attention(q, k):
    """Causal attention weights float64[L, B, H, n, n] and lse [L, B, n, H], the plain way."""
    k = np.repeat(k, q.shape[3] // k.shape[3], axis=3)
    score = np.einsum("lbqhd,lbshd->lbhqs", q.astype(np.float64), k) * q.shape[-1] ** -0.5
    n = q.shape[2]
    score = np.where(np.tril(np.ones((n, n), bool)), score, -np.inf)
    top = score.max(-1, keepdims=True)
    total = np.exp(score - top).sum(-1, keepdims=True)
    lse = (top + np.log(total))[..., 0]
    return np.exp(score - top) / total, np.moveaxis(lse, 2, 3)


def make_view(q, k, v, *, page_size=4, spare=0, layers_per_page=1, heads_per_page=1, lengths=None,
              poison=True, **fields):  # fmt: skip
    """A view of these arrays in shuffled pages; what no row has written is NaN."""
    (layers, rows, n, _, d), kv_heads = q.shape, k.shape[3]
    r, c = layers_per_page or layers, heads_per_page or kv_heads
    lengths = np.full(rows, n) if lengths is None else np.asarray(lengths)
    entries = -(-n // page_size) + spare
    groups, head_groups = -(-layers // r), kv_heads // c
    num_pages = groups * head_groups * rows * entries
    order = np.random.default_rng(7).permutation(num_pages).astype(np.int32)
    pages = order.reshape(groups, head_groups, rows, entries)
    shape = (num_pages, r, c, page_size, d)
    planes = [np.full(shape, np.nan if poison else 0.0, np.float32) for _ in range(2)]
    position = np.full((num_pages, page_size), -1, np.int32)
    for group, head, row in np.ndindex(groups, head_groups, rows):
        for slot in range(lengths[row]):
            page, offset = pages[group, head, row, slot // page_size], slot % page_size
            position[page, offset] = slot
            for plane, x in zip(planes, (k, v), strict=True):
                for i in range(min(r, layers - group * r)):
                    own = x[group * r + i, row, slot, head * c : head * c + c]
                    plane[page, i, :, offset] = own
    pool = KVPool(
        k=jnp.asarray(planes[0]), v=jnp.asarray(planes[1]), position=jnp.asarray(position)
    )
    whole = np.broadcast_to(lengths[None, None], (groups, head_groups, rows)).astype(np.int32)
    table = PageTable(
        pages=jnp.asarray(pages), length=jnp.asarray(whole),
        position=jnp.asarray(lengths.astype(np.int32)),
    )  # fmt: skip
    return View(pool=pool, table=table, seen=observe(q, k, lengths), **fields)


def observe(q, k, lengths):
    """All queries of each row, at the right."""
    rows, n = q.shape[1:3]
    lse = attention(q, k)[1]
    queries, sums = np.zeros_like(q), np.zeros(lse.shape, np.float32)
    position = np.full((rows, n), -1, np.int32)
    for row, length in enumerate(lengths):
        queries[:, row, n - length :] = q[:, row, :length]
        sums[:, row, n - length :] = lse[:, row, :length]
        position[row, n - length :] = np.arange(length)
    return Observation(
        q=jnp.asarray(queries), lse=jnp.asarray(sums), position=jnp.asarray(position)
    )


def tokens(view, count):
    """The same budget for every row."""
    return jnp.full((view.shape[2],), count, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def keep_of(policy, view, count):
    return policy.keep(view, count)


def kept_by(policy, view, count):
    """What a policy keeps of the same budget for every row; compiled once."""
    return keep_of(policy, view, tokens(view, count))


def slots(keep):
    """Kept slots of [layer][kv head][row] as lists."""
    keep = np.asarray(keep)
    return [[[np.flatnonzero(row).tolist() for row in head] for head in layer] for layer in keep]
