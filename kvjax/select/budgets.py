"""How much may stay: budgets as people write them, and how layers and heads share them."""

import dataclasses
import re
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.errors import InputError

__all__ = [
    "Budget",
    "code_budgets",
    "linear_budgets",
    "paper_budgets",
    "parse_budget",
    "redistribute",
    "share_out",
]

Array = jax.Array
Number = TypeVar("Number", int, float, np.ndarray, Array)

_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of a row's cache may stay.

    Attributes:
        amount: of `unit`.
        unit: "ratio" of the prompt's own bytes, "tokens" a KV head of a layer on average, or
            "bytes" of the row.
        text: as it was written.
    """

    amount: float
    unit: str
    text: str

    def tokens(self, length: np.ndarray, token_bytes: int, page_size: int) -> np.ndarray:
        """Tokens that a KV head of a layer may keep on average: whole pages, and at least one.

        Args:
            length: int[B], tokens of each prompt.
            token_bytes: of one token in all layers and heads.
            page_size: P.
        """
        if self.unit == "ratio":
            tokens = np.floor(self.amount * length + 1e-9)
        else:
            tokens = np.full(length.shape, self.amount if self.unit == "tokens" else 0.0)
        if self.unit == "bytes":
            tokens = np.full(length.shape, self.amount // token_bytes)
        pages = np.maximum(tokens // page_size, 1)
        # A prompt's last page may be partly filled: all of its pages are all of the budget.
        kept = np.where(tokens >= length, length, pages * page_size)
        return np.minimum(kept, length).astype(np.int32)


def parse_budget(text: str | float | int) -> Budget:
    """A budget from "1/8", "12%", 0.12 (ratios), 256 (tokens a head) or "64MiB" (bytes a row).

    >>> parse_budget("1/8").amount, parse_budget("64KiB").unit
    (0.125, 'bytes')
    """
    written = str(text).strip()
    if match := re.fullmatch(r"(\d+)/(\d+)", written):
        amount, unit = int(match[1]) / max(1, int(match[2])), "ratio"
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", written):
        amount, unit = float(match[1]) / 100, "ratio"
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)", written):
        amount, unit = float(match[1]) * _UNITS[match[2]], "bytes"
    elif re.fullmatch(r"\d+", written):
        amount, unit = float(written), "tokens"
    elif re.fullmatch(r"\d*\.\d+", written):
        amount, unit = float(written), "ratio"
    else:
        raise InputError(f"{written!r} is no budget: write such as 1/8, 12%, 256 or 64MiB")
    if amount <= 0 or (unit == "ratio" and amount > 1):
        raise InputError(f"budget {written!r}: a ratio is above 0 and at most 1, others above 0")
    return Budget(amount, unit, written)


def code_budgets(capacity: Number, group: int, groups: int, shape: int = 14) -> list[Number]:
    """WindowKV's budgets of a layer, bottom group first, as the released code computes them.

    The top group has `capacity * group // shape` (the paper's budget of a group of layers taken
    for that of one), the bottom one what makes their mean the capacity, with a whole step between.

    Raises:
        InputError: `group` above `shape`, where the top would get most.
    """
    if group > shape:
        raise InputError(
            f"{group} layers a group with shape {shape}: take fewer, or a larger shape"
        )
    if groups == 1:
        return [capacity]
    last = capacity * group // shape
    first = 2 * capacity - last
    step = (first - last) // (groups - 1)
    return [first - h * step for h in range(groups - 1)] + [last]


def paper_budgets(capacity: Number, groups: int, shape: int = 14) -> list[Number]:
    """WindowKV's budgets of a layer, bottom group first, after equations 5 to 7.

    `capacity / shape` at the top, `2 * capacity` less that at the bottom, a line between. They
    are rounded down where the capacity is whole.
    """
    if groups == 1:
        return [capacity]
    ends = (2 * shape - 1) * (groups - 1), shape * (groups - 1)
    step = 2 * shape - 2
    if isinstance(capacity, float):
        return [capacity * (ends[0] - h * step) / ends[1] for h in range(groups)]
    return [capacity * (ends[0] - h * step) // ends[1] for h in range(groups)]


def linear_budgets(capacity: Array, limit: Array, layers: int, beta: int, least: int) -> Array:
    """PyramidKV's budgets of a layer, bottom first: a line from much to little, as in kvpress.

    Args:
        capacity: int32[B], tokens of a layer on average.
        limit: int32[B], the most that a layer can use.
        layers: L.
        beta: the top layer gets the beta-th part of the mean.
        least: or so many tokens if that is more, but no more than the mean.

    Returns:
        int32[L, B].
    """
    mean, limit = capacity.astype(jnp.float32), limit.astype(jnp.float32)
    top = jnp.maximum(mean / beta, jnp.minimum(mean, float(least)))
    bottom = jnp.minimum(2 * mean - top, jnp.maximum(limit, mean))
    step = (2 * bottom - 2 * mean) / max(1, layers - 1)
    layer = jnp.arange(layers, dtype=jnp.float32)[:, None]
    return jnp.round(bottom[None] - layer * step[None]).astype(jnp.int32)


def redistribute(budgets: Array, limit: Array, weights: Array | None = None) -> Array:
    """What a part has beyond its limit goes to the others, in whole tokens.

    Args:
        budgets: int32[G, ...].
        limit: int32[G, ...], the most that a part can use.
        weights: float32[G, ...], in which proportion the others share; None: equally.

    Returns:
        int32[G, ...], nowhere above the limit, with at most the same sum.
    """
    weights = jnp.ones(budgets.shape, jnp.float32) if weights is None else weights
    for _ in range(budgets.shape[0]):
        excess = jnp.sum(jnp.maximum(budgets - limit, 0), axis=0, keepdims=True)
        budgets = jnp.minimum(budgets, limit)
        open_to = jnp.where(budgets < limit, weights, 0.0)
        total = jnp.maximum(jnp.sum(open_to, axis=0, keepdims=True), 1e-30)
        budgets = budgets + (excess.astype(jnp.float32) * (open_to / total)).astype(jnp.int32)
    return jnp.minimum(budgets, limit)


def share_out(parts: Array, total: Array, unit: int, axes: Sequence[int]) -> Array:
    """Rounds shares to multiples of a unit, so that they sum to the total in whole units.

    What rounding down leaves over goes to those that it took most from (largest remainders).

    Args:
        parts: int32[...], which sum to about `total` over `axes`, and never to less in units.
        total: int32, of the shape that a sum over `axes` has.
        unit: such as the tokens of a page.
        axes: leading axes 0 .. len(axes) - 1, over which the total is shared.
    """
    count = len(axes)
    flat = parts.reshape(-1, *parts.shape[count:])
    left = total // unit - jnp.sum(flat // unit, axis=0)
    order = jnp.argsort(-(flat % unit), axis=0, stable=True)
    rank = jnp.argsort(order, axis=0, stable=True)
    units = flat // unit + (rank < left[None]).astype(jnp.int32)
    return (units * unit).reshape(parts.shape)
