"""Models: the Llama-family decoder, and what reads and writes its weights."""

from kvjax.models.attention import causal_attend
from kvjax.models.decoder import Attend, Decoder, DecoderConfig, Rope

__all__ = ["Attend", "Decoder", "DecoderConfig", "Rope", "causal_attend"]
