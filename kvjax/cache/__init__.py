"""The cache as a value: pages, the table that says who reads them, and who owns them."""

from kvjax.cache.frames import FrameRing, FrameRingConfig, NewFrames, append_frames, frames_held
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
    "FrameRing",
    "FrameRingConfig",
    "KVPool",
    "NewFrames",
    "OutOfPages",
    "PageLedger",
    "PageTable",
    "PrefixTrie",
    "Slots",
    "advance",
    "append_frames",
    "compact",
    "copy_pages",
    "fork_rows",
    "frames_held",
    "gather",
    "grow",
    "seat",
    "slots_of",
    "write",
    "write_positions",
]
