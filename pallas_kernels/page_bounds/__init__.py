"""Bounds of each page's keys, kept up as tokens come, and queries' scores over them."""

from kvjax.pallas_kernels.page_bounds.api import append_bounds, page_scores, rebuild_bounds
from kvjax.pallas_kernels.page_bounds.reference import gather_bounds, merge_pages, score_bounds

__all__ = [
    "append_bounds",
    "gather_bounds",
    "merge_pages",
    "page_scores",
    "rebuild_bounds",
    "score_bounds",
]
