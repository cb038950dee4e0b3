"""The page table: which pages each row of a batch attends to, in order.

Letters as in `kvjax.cache.pool`. The entry N, never -1, means no page: reads of it are masked and
writes to it are dropped.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from kvjax.cache.pool import CacheConfig

__all__ = ["PageTable", "Slots", "advance", "fork_rows", "grow", "seat", "slots_of"]

Array = jax.Array

# A page that no pool has: what is written there is dropped.
_NOWHERE = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PageTable:
    """A batch's view of a pool. Each group of layers and of heads may see other pages.

    Attributes:
        pages: int32[L/R, K/C, B, M].
        length: int32[L/R, K/C, B] slots in use; after an eviction fewer than `position`.
        position: int32[B] the next true position, from which the rotary angles go on.
    """

    pages: Array
    length: Array
    position: Array

    @staticmethod
    def empty(config: "CacheConfig") -> "PageTable":
        """A table whose rows hold nothing."""
        shape = (*config.tables, config.max_rows)
        return PageTable(
            pages=jnp.full((*shape, config.pages_per_row), config.num_pages, jnp.int32),
            length=jnp.zeros(shape, jnp.int32),
            position=jnp.zeros((config.max_rows,), jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Where tokens are written: page and offset in it, both int32[L/R, K/C, T]; page N: nowhere."""

    page: Array
    offset: Array


def seat(table: PageTable, rows: Array, pages: Array, length: Array) -> PageTable:
    """Gives rows the pages of a prefix that is already in the pool, dense from position 0.

    Args:
        table: donate it.
        rows: int32[n]; B and above are dropped.
        pages: int32[n, M], N where there is none; all layer and head groups get the same.
        length: int32[n] tokens of the prefix.
    """
    shape = (*table.pages.shape[:2], *pages.shape)
    return PageTable(
        pages=table.pages.at[:, :, rows].set(
            jnp.broadcast_to(pages[None, None], shape), mode="drop"
        ),
        length=table.length.at[:, :, rows].set(
            jnp.broadcast_to(length[None, None], shape[:3]), mode="drop"
        ),
        position=table.position.at[rows].set(length, mode="drop"),
    )


def grow(table: PageTable, row: Array, index: Array, page: Array) -> PageTable:
    """Sets single entries, the same in all layer and head groups; rows from B on are dropped.

    Args:
        table: donate it.
        row: int32[n].
        index: int32[n], which of the row's M entries.
        page: int32[n].
    """
    value = jnp.broadcast_to(page[None, None], (*table.pages.shape[:2], *page.shape))
    pages = table.pages.at[:, :, row, index].set(value, mode="drop")
    return dataclasses.replace(table, pages=pages)


def slots_of(table: PageTable, row: Array, position: Array, page_size: int) -> Slots:
    """The slots of new tokens, which follow their row's last one in the order of positions.

    Args:
        table: whose rows have the pages that the tokens need.
        row: int32[T]; a token of row B or above goes nowhere.
        position: int32[T] true positions, from `table.position[row]` on.
        page_size: P.
    """
    max_rows, pages_per_row = table.position.shape[0], table.pages.shape[-1]
    clipped = jnp.minimum(row, max_rows - 1)
    slot = table.length[:, :, clipped] + (position - table.position[clipped])[None, None]
    index = jnp.clip(slot // page_size, 0, pages_per_row - 1)
    page = jnp.take_along_axis(table.pages[:, :, clipped], index[..., None], axis=-1)[..., 0]
    fits = (row < max_rows)[None, None] & (slot < pages_per_row * page_size)
    return Slots(page=jnp.where(fits, page, _NOWHERE), offset=slot % page_size)


def advance(table: PageTable, row: Array) -> PageTable:
    """Counts one more token for every entry of `row`, int32[T]; B and above are dropped."""
    one = jnp.ones(row.shape, jnp.int32)
    return dataclasses.replace(
        table,
        length=table.length.at[:, :, row].add(
            jnp.broadcast_to(one[None, None], (*table.length.shape[:2], *row.shape)), mode="drop"
        ),
        position=table.position.at[row].add(one, mode="drop"),
    )


def fork_rows(
    table: PageTable, parents: Array, spare_pages: Array, page_size: int
) -> tuple[PageTable, Array, Array]:
    """Every row becomes a copy of its parent; only a partly filled last page is not shared.

    Args:
        table: donate it.
        parents: int32[B]; a row that is its own parent keeps its pages; B empties the row.
        spare_pages: int32[L/R, K/C, B], set aside by the ledger, one for each row that may need it.
        page_size: P.

    Returns:
        The table, and the pages to copy: source and target, int32[L/R * K/C * B] each, for
        `copy_pages`. A target of int32's maximum means that the row needed no copy and its spare
        page is still free.
    """
    max_rows = table.position.shape[0]
    empty = parents >= max_rows
    parent = jnp.minimum(parents, max_rows - 1)
    length = jnp.where(empty[None, None], 0, table.length[:, :, parent])
    pages = table.pages[:, :, parent]
    last = (length // page_size)[..., None]  # the entry of the partly filled page
    moved = ~empty & (parents != jnp.arange(max_rows))
    copied = (length % page_size > 0) & moved[None, None]
    source = jnp.take_along_axis(pages, jnp.minimum(last, pages.shape[-1] - 1), axis=-1)[..., 0]
    entry = jnp.arange(pages.shape[-1])[None, None, None]
    pages = jnp.where((entry == last) & copied[..., None], spare_pages[..., None], pages)
    # Pages beyond the last token were set aside for the parent: two rows must not write there.
    unused = entry * page_size >= length[..., None]
    pages = jnp.where(unused & (empty | moved)[None, None, :, None], _NOWHERE, pages)
    target = jnp.where(copied, spare_pages, _NOWHERE)
    position = jnp.where(empty, 0, table.position[parent])
    forked = PageTable(pages=pages, length=length, position=position)
    return forked, source.reshape(-1), target.reshape(-1)
