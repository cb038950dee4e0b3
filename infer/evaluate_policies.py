"""The policies of `kvjax eval` by name, and how options are added to a name."""

import ast
import dataclasses
from collections.abc import Callable, Mapping

from kvjax.errors import InputError
from kvjax.select import (
    H2O,
    TOVA,
    AdaKV,
    ChunkKV,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    MPCache,
    Oracle,
    Policy,
    PyramidKV,
    RandomTokens,
    RandomWindows,
    SnapKV,
    StreamingLLM,
    WindowKV,
)

__all__ = ["POLICIES", "read_policy"]

# How layers and heads of `tiny` share a budget: `evaluate_calibrate` at 12 %, protocol A, on two
# documents of each task (seed 4,000,000).
_TINY = (
    (0.638, 0.02), (0.08, 0.319), (5.1, 5.1), (0.638, 0.08), (2.55, 0.319), (0.638, 0.319),
    (0.04, 0.08), (0.002, 0.08),
)  # fmt: skip
# alpha is 8 everywhere: of 32 tokens, the smallest budget of the suite, more would leave nothing.
POLICIES: Mapping[str, Callable[[], Policy | None]] = {
    "full": lambda: None,
    "windowkv": lambda: WindowKV(window=4, alpha=8, heads="each", kernel=5, distinct=0.5),
    "windowkv-tiny": lambda: WindowKV(
        window=4,
        alpha=32,
        last=8,
        heads="each",
        kernel=5,
        distinct=0.8,
        budgets="shares",
        shares=_TINY,
    ),
    "windowkv-paper": lambda: WindowKV(window=8, alpha=8, group=4, budgets="paper", strict=True),
    "windowkv-code": lambda: WindowKV(
        window=8, alpha=8, group=4, budgets="code", strategy="demo", share_rest=False
    ),
    "mpcache": lambda: MPCache(),
    "mpcache-paper": lambda: MPCache(extra=True),
    "quest": lambda: MPCache(static=1.0, rep="exact_bound", fan=1),
    "streaming": lambda: StreamingLLM(),
    "h2o": lambda: H2O(),
    "tova": lambda: TOVA(),
    "snapkv": lambda: SnapKV(last=8),
    "snapkv-max": lambda: SnapKV(last=8, kernel=7, pooling="max"),
    "pyramidkv": lambda: PyramidKV(last=8, fallback=False),
    "knorm": lambda: Knorm(),
    "keydiff": lambda: KeyDiff(),
    "chunkkv": lambda: ChunkKV(chunk=8, last=8),
    "expected-attention": lambda: ExpectedAttention(),
    "adakv": lambda: AdaKV(scorer=SnapKV(last=8)),
    "adakv-expected": lambda: AdaKV(scorer=ExpectedAttention()),
    "random-tokens": lambda: RandomTokens(),
    "random-windows": lambda: RandomWindows(),
    "oracle": lambda: Oracle(),
}


def read_policy(text: str) -> Policy | None:
    """A policy from its name, or a name with options such as "windowkv:window=16,alpha=4".

    >>> read_policy("snapkv:last=4,kernel=7")
    SnapKV(last=4, kernel=7, pooling='mean')

    Returns:
        The policy; None for "full", which keeps everything.
    """
    name, _, options = text.partition(":")
    if name not in POLICIES:
        raise InputError(f"no policy {name!r}: use some of {', '.join(POLICIES)}")
    policy = POLICIES[name]()
    if not options:
        return policy
    known = [field.name for field in dataclasses.fields(policy)] if policy else []
    given = {}
    for option in _split(options):
        key, _, value = option.partition("=")
        if key not in known:
            raise InputError(f"{name} has no option {key!r}: it has {', '.join(known) or 'none'}")
        given[key] = _value(value)
    return None if policy is None else dataclasses.replace(policy, **given)


def _split(options: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for letter in options:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _value(text: str) -> object:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return _frozen(value)


def _frozen(value: object) -> object:
    """Lists as tuples: a policy is a static argument, and so has to be hashable."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
