"""Attention over pages: decode, chunked prefill, shared prefixes and trees through one call."""

from kvjax.pallas_kernels.page_attention.api import page_attention, prepare
from kvjax.pallas_kernels.page_attention.merge import merge
from kvjax.pallas_kernels.page_attention.work import Items, Pages, WorkList

__all__ = ["Items", "Pages", "WorkList", "merge", "page_attention", "prepare"]
