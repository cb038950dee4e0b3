"""Inference: the engine, its public API, and the commands."""

from kvjax.infer.answers import Chunk, Completion, TokenLogprob
from kvjax.infer.llm import LLM
from kvjax.infer.sampling import SamplingParams
from kvjax.infer.scores import Score

__all__ = ["LLM", "Chunk", "Completion", "SamplingParams", "Score", "TokenLogprob"]
