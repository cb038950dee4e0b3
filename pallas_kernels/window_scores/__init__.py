"""The attention that a prompt's last queries pay to every token before them, summed by window."""

from kvjax.pallas_kernels.window_scores.api import window_scores
from kvjax.pallas_kernels.window_scores.reference import summarize

__all__ = ["summarize", "window_scores"]
