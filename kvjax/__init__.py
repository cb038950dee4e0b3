"""kvjax: a KV cache is a value, and six published methods are small functions on it.

`kvjax.LLM` and `kvjax.SamplingParams` are those of `kvjax.infer`, loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvjax.infer import LLM, SamplingParams

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("kvjax.infer"), name)
    raise AttributeError(f"module 'kvjax' has no attribute {name!r}")
