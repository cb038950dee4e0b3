"""Attention over frames at every place, and over places inside frames: what a video model needs."""

from kvjax.pallas_kernels.frame_attention.api import frame_attention
from kvjax.pallas_kernels.frame_attention.places import place_attention

__all__ = ["frame_attention", "place_attention"]
