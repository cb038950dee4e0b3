"""Causal attention of whole sequences to themselves, where no pages are involved."""

from kvjax.pallas_kernels.prefill_attention.api import prefill_attention

__all__ = ["prefill_attention"]
