"""Inference: the engine, its public API, and the commands."""

from kvjax.infer.llm import LLM, Chunk, Completion
from kvjax.infer.sampling import SamplingParams

__all__ = ["LLM", "Chunk", "Completion", "SamplingParams"]
