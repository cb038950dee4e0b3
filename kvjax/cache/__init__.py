"""The cache as a value: pages, the table that says who reads them, and who owns them."""

from kvjax.cache.ledger import OutOfPages, PageLedger
from kvjax.cache.pool import (
    CacheConfig,
    KVPool,
    compact,
    copy_pages,
    gather,
    write,
    write_positions,
)
from kvjax.cache.table import PageTable, Slots, advance, fork_rows, grow, seat, slots_of
from kvjax.cache.trie import Branch, Extension, PrefixTrie

__all__ = [
    "Branch",
    "CacheConfig",
    "Extension",
    "KVPool",
    "OutOfPages",
    "PageLedger",
    "PageTable",
    "PrefixTrie",
    "Slots",
    "advance",
    "compact",
    "copy_pages",
    "fork_rows",
    "gather",
    "grow",
    "seat",
    "slots_of",
    "write",
    "write_positions",
]
