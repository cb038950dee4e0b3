"""Inference: the engine, its public API, and the commands."""

from kvjax.infer.answers import Chunk, Completion, TokenLogprob
from kvjax.infer.chat import Chat
from kvjax.infer.llm import LLM
from kvjax.infer.prefix import Prefix
from kvjax.infer.sampling import SamplingParams
from kvjax.infer.saved_cache import SavedCache, fingerprint, load_cache, put_pages, save_cache
from kvjax.infer.scores import Score

__all__ = [
    "LLM",
    "Chat",
    "Chunk",
    "Completion",
    "Prefix",
    "SamplingParams",
    "SavedCache",
    "Score",
    "TokenLogprob",
    "fingerprint",
    "load_cache",
    "put_pages",
    "save_cache",
]
