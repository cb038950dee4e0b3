"""The work list: what attends to what, as data.

An item is a run of queries times a run of one row's pages. A row that decodes is one item, or
several if it is long; a prefix that rows share is one item for the queries of all of them; a tree
is one item per node, for the queries below it. A query may be in any number of items: its result
is as if all their keys had been in one. So that it does not matter who else is in the batch, a
planner cuts a row at fixed multiples, never by how much work there is.
"""

import dataclasses
from typing import Protocol

import jax

from kvjax.pallas_kernels.page_attention.gpu_plan import Plan

__all__ = ["Items", "Pages", "WorkList"]

Array = jax.Array


class Pages(Protocol):
    """What attention reads of a pool; `kvjax.cache.KVPool` is one."""

    @property
    def k(self) -> Array:
        """[N, R, C, P, D]."""
        ...

    @property
    def v(self) -> Array:
        """[N, R, C, P, D]."""
        ...

    @property
    def position(self) -> Array | None:
        """int32[N, P] true positions, -1 for a dead slot; None: a slot's index is its position."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """Items of one size class.

    Attributes:
        index: int32[I, 5]: row of the table, first page, end page, first query, end query.
        count: int32 scalar, how many of the I are in use; the others may hold anything.
        max_queries: the most queries that an item spans.
        max_pages: the most pages that an item spans.
    """

    index: Array
    count: Array
    max_queries: int = dataclasses.field(metadata={"static": True})
    max_pages: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkList:
    """All items of a step, and what they refer to.

    Attributes:
        items: one entry per size class, such as decoding rows and chunks of prompts.
        pages: int32[L/R, K/C, B, M], the table; N or above: no page.
        length: int32[L/R, K/C, B], slots in use, the step's own tokens included.
        query_position: int32[T], true positions; -1 for a query that is padding.
        prepared: what `prepare` made of all this for a GPU; None: a call makes it itself.
    """

    items: tuple[Items, ...]
    pages: Array
    length: Array
    query_position: Array
    prepared: Plan | None = None
