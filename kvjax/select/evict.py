"""Eviction as surgery on the page table: what stays, what is free, what moves."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.cache import KVPool, PageTable, compact

__all__ = ["Evicted", "evict", "evict_pages", "evict_tokens", "pages_held"]

Array = jax.Array


class Evicted(NamedTuple):
    """A cache after an eviction.

    Attributes:
        pool: the pages.
        table: the rows; `position` is as it was, so that the rotary angles go on.
        freed: int32[L/R, K/C, B, M], pages that no row refers to any more; N: no page.
    """

    pool: KVPool
    table: PageTable
    freed: Array


def evict(
    pool: KVPool, table: PageTable, keep: Array, *, whole_pages: bool = False, spare: int = 0
) -> Evicted:
    """Keeps some slots of every row.

    Args:
        pool: donate it unless it is needed as it was.
        table: each row the only owner of its pages.
        keep: bool[L, K, B, S] by slot; equal in all layers and heads that share a page.
        whole_pages: `keep` keeps all slots of a page or none, so no byte has to be moved.
        spare: how many of the pages beyond those kept a row holds on to, for tokens to come.
    """
    _, r, c, _, _ = pool.k.shape
    keep = keep[::r, ::c]  # the first layer and head of each page
    run = evict_pages if whole_pages else evict_tokens
    return run(pool, table, keep, spare)


def evict_pages(pool: KVPool, table: PageTable, keep: Array, spare: int = 0) -> Evicted:
    """Keeps whole pages, in their order; see `evict`, but `keep` is bool[L/R, K/C, B, S]."""
    size, num_pages = pool.k.shape[3], pool.k.shape[0]
    pages = table.pages
    entry = jnp.arange(pages.shape[-1], dtype=jnp.int32)[None, None, None]
    filled = jnp.clip(table.length[..., None] - entry * size, 0, size)
    kept = jnp.any(keep.reshape(*pages.shape, size), axis=-1) & (filled > 0)
    length = jnp.sum(jnp.where(kept, filled, 0), axis=-1)
    # Kept pages first; then those with an owner, which may serve as spare ones.
    rank = jnp.where(kept, 0, jnp.where(pages < num_pages, 1, 2))
    order = jnp.argsort(rank, axis=-1, stable=True)
    pages = jnp.take_along_axis(pages, order, axis=-1)
    return _trim(pool, table, pages, length, spare)


def evict_tokens(pool: KVPool, table: PageTable, keep: Array, spare: int = 0) -> Evicted:
    """Keeps single tokens, which move together; see `evict`, but `keep` is bool[L/R, K/C, B, S]."""
    rows = jnp.arange(table.position.shape[0], dtype=jnp.int32)
    pool, compacted = compact(pool, table, rows, keep)
    return _trim(pool, table, table.pages, compacted.length, spare)


def _trim(
    pool: KVPool, table: PageTable, pages: Array, length: Array, spare: int
) -> Evicted:  # fmt: skip
    """Takes the entries from a row that it needs no more."""
    num_pages, size = pool.k.shape[0], pool.k.shape[3]
    entry = jnp.arange(pages.shape[-1], dtype=jnp.int32)[None, None, None]
    needed = entry < (-(-length // size) + spare)[..., None]
    trimmed = dataclasses.replace(table, pages=jnp.where(needed, pages, num_pages), length=length)
    return Evicted(pool, trimmed, jnp.where(needed, num_pages, pages))


def pages_held(table: PageTable, num_pages: int, page_size: int) -> Array:
    """Pages that hold a row's tokens, int32[B]: spare ones, which hold none yet, do not count."""
    entry = jnp.arange(table.pages.shape[-1], dtype=jnp.int32)[None, None, None]
    used = (table.pages < num_pages) & (entry * page_size < table.length[..., None])
    return jnp.sum(used, axis=(0, 1, 3), dtype=jnp.int32)
