"""Pages that rows of a step share, read once for all of them.

Rows whose tables begin with the same pages stand beside each other; a run of such pages and the
queries of all rows that share it become one piece of work. Pages are compared by their numbers, so
it does not matter who made them shared: a planned prefix, a chat, or a search tree, level by level.
"""

from typing import NamedTuple

import numpy as np

from kvjax.plan.prefix_groups import PrefixTree

__all__ = ["Shared", "order_sharers", "shared_pages"]

Array = np.ndarray

# A query with one more partial result costs about as much as to read so many tokens: 2 H / K of
# them for float32 results and bfloat16 pages, with 4 query heads a KV head.
_MERGE_TOKENS = 8


class Shared(NamedTuple):
    """What rows read together, and from where on each reads by itself.

    Attributes:
        row: int[n], the first of the rows that share a run of pages, as an index into the rows.
        first_page, end_page: int[n], the run.
        first, end: int[n], the queries of all these rows.
        start: int[rows], the pages of each row that are in such runs.
    """

    row: Array
    first_page: Array
    end_page: Array
    first: Array
    end: Array
    start: Array


def order_sharers(pages: Array) -> Array:
    """The order of rows in which those with the most leading pages in common are neighbours.

    Args:
        pages: int32[rows, M], none below 0.

    Returns:
        int[rows]; rows that share nothing keep no particular order.
    """
    keys = pages.astype(">i4").tobytes()  # bytes of the highest first compare as numbers do
    width = 4 * pages.shape[1]
    rows = range(len(pages))
    return np.array(sorted(rows, key=[keys[i * width : (i + 1) * width] for i in rows].__getitem__))


def shared_pages(
    pages: Array, depth: Array, counts: Array, *, page_size: int, tile: int, least: int, split: int,
    max_items: int, max_pairs: int,
) -> Shared:  # fmt: skip
    """Finds the runs of pages that it pays to read together.

    Args:
        pages: int32[rows, M] the rows' tables, sharers beside each other.
        depth: int[rows], the leading pages that all queries of a row may read whole.
        counts: int[rows], the queries of each row, which stand after each other.
        page_size: tokens.
        tile: the most queries of a work item.
        least: pages of a run.
        split: pages of a work item, which are cut at multiples of it.
        max_items: room for the work items of shared runs.
        max_pairs: room for (work item, query) pairs of shared runs.
    """
    rows, ends = len(pages), np.cumsum(counts)
    start = np.zeros(rows, np.int64)
    common = _common(pages, depth)
    if common.max() < least:
        return _as_shared([], start)
    tree = PrefixTree.of_neighbours(np.arange(rows), common)
    # Queries and work items below each node, if every row read for itself.
    first_query = np.concatenate([[0], ends])
    items = np.concatenate([[0], np.cumsum(-(-counts // tile))])
    queries = first_query[tree.end] - first_query[tree.first]
    alone = items[tree.end] - items[tree.first]
    found: list[tuple[int, int, int, int, int]] = []
    begin: list[int] = []  # where a node's own run begins: the end of the last one above it
    columns = (tree.parent, tree.depth, tree.first, tree.end, queries, alone)
    for above, deep, first, end, many, single in zip(*(c.tolist() for c in columns), strict=True):
        begin.append(from_page := begin[above] if above >= 0 else 0)
        tiles, length = -(-many // tile), deep - from_page
        pieces = -(-deep // split) - from_page // split
        pays = (single - tiles) * length * page_size > _MERGE_TOKENS * many
        if length < least or not pays or tiles * pieces > max_items or many * pieces > max_pairs:
            continue
        max_items, max_pairs = max_items - tiles * pieces, max_pairs - many * pieces
        begin[-1] = deep
        start[first:end] = deep
        found.append((first, from_page, deep, int(first_query[first]), int(first_query[end])))
    return _as_shared(found, start)


def _as_shared(found: list[tuple[int, int, int, int, int]], start: Array) -> Shared:
    row, first_page, end_page, first, end = np.array(found, np.int64).reshape(-1, 5).T
    return Shared(row, first_page, end_page, first, end, start)


def _common(pages: Array, depth: Array) -> Array:
    """How many leading pages each row shares with the one before: int[rows + 1], 0 at the ends."""
    common = np.zeros(len(pages) + 1, np.int64)
    width = int(depth.max(initial=0))
    if len(pages) > 1 and width:
        differ = pages[1:, :width] != pages[:-1, :width]
        first = np.where(differ.any(1), differ.argmax(1), width)
        common[1:-1] = np.minimum(first, np.minimum(depth[1:], depth[:-1]))
    return common
