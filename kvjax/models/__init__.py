"""Models: the Llama-family decoder, the video transformer, and their weights."""

from kvjax.models.attention import causal_attend
from kvjax.models.decoder import Attend, Decoder, DecoderConfig, Rope
from kvjax.models.video_dit import VideoDiT, VideoDiTConfig

__all__ = [
    "Attend",
    "Decoder",
    "DecoderConfig",
    "Rope",
    "VideoDiT",
    "VideoDiTConfig",
    "causal_attend",
]
