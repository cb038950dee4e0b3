"""What a batch must cost at least on a device, and how much of the device a run has used."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from kvjax.models import DecoderConfig
from kvjax.plan import Grid, Planned, Request, plan_prefixes

__all__ = ["Calls", "Rates", "Usage", "perfect_seconds", "work_of_call"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device can do; by default as measured on an H200 by large copies and products.

    Attributes:
        flops: of bfloat16 matrix products, a second.
        bytes: read and written a second.
    """

    flops: float = 783e12
    bytes: float = 4.23e12


@dataclasses.dataclass(frozen=True)
class Usage:
    """Floating-point operations and bytes read, and the tokens that they were for."""

    flops: float = 0.0
    bytes: float = 0.0
    tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.flops + other.flops, self.bytes + other.bytes, self.tokens + other.tokens)

    def seconds(self, rates: Rates) -> float:
        """At least, if nothing overlaps."""
        return self.flops / rates.flops + self.bytes / rates.bytes


def _item_bytes(model: DecoderConfig) -> int:
    return jnp.dtype(model.dtype).itemsize


def _layer_weights(model: DecoderConfig) -> int:
    """Weights of all layers that a token is multiplied with."""
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return model.num_layers * model.embed_dim * (heads + 3 * model.mlp_dim)


def _usage(model: DecoderConfig, tokens: int, drawn: int, pairs: float, kv: float) -> Usage:
    """Of tokens computed, tokens drawn, (query, key) pairs, and keys read, weights apart."""
    flops = 2.0 * tokens * _layer_weights(model) + 2.0 * drawn * model.vocab_size * model.embed_dim
    flops += 4.0 * pairs * model.num_heads * model.head_dim * model.num_layers
    per_token = 2 * model.num_kv_heads * model.head_dim * model.num_layers * _item_bytes(model)
    return Usage(flops, kv * per_token, tokens)


def _weight_bytes(model: DecoderConfig) -> float:
    weights = _layer_weights(model) + model.vocab_size * model.embed_dim
    return float(weights * _item_bytes(model))


def perfect_seconds(
    requests: Sequence[Request], model: DecoderConfig, rates: Rates, budget: int
) -> float:
    """What a perfect plan needs: nothing is computed twice, every step is full.

    Shared tokens are computed once; all that go on from the same tokens decode together and read
    them once a step. Weights are read once a step. Computing and reading do not overlap.

    Args:
        requests: all draw their `max_tokens`.
        model: the decoder's sizes.
        rates: the device's.
        budget: tokens a step.
    """
    plan = plan_prefixes([request.prompt[:-1] for request in requests])
    shared = np.zeros(len(requests), np.int64)  # tokens of a prompt that others have too
    pairs = kv = 0.0
    for group in plan.groups:
        above = plan.groups[group.parent].length if group.parent >= 0 else 0
        shared[list(group.members)] = group.length
        draws = max([requests[m].max_tokens for m in group.members], default=0)
        kv += (group.length - above) * draws
        pairs += (group.length * (group.length + 1) - above * (above + 1)) / 2
    prompt = np.array([len(request.prompt) for request in requests])
    draws = np.array([request.max_tokens for request in requests])
    end = prompt + draws - 1  # the last token drawn is not computed
    pairs += float(np.sum(end * (end + 1) - shared * (shared + 1)) / 2)
    kv += float(np.sum((draws - 1) * ((prompt + 1 + end) / 2 - shared)))
    tokens = int(np.sum(prompt) - plan.saved + np.sum(draws - 1))
    usage = _usage(model, tokens, int(draws.sum()), pairs, kv)
    return usage.seconds(rates) + tokens / budget * _weight_bytes(model) / rates.bytes


def work_of_call(planned: Planned, grid: Grid, model: DecoderConfig) -> Usage:
    """What a call computes and reads, by its own work items."""
    step, steps = planned.step, int(planned.step.steps)
    first = int(np.count_nonzero(step.row < grid.max_rows))
    drawn = int(step.room.sum())
    tokens = first + int(np.maximum(step.room - 1, 0).sum())
    pairs = keys = 0.0
    for items, count in ((step.singles, step.num_singles), (step.tiles, step.num_tiles)):
        _, first_page, end_page, query, end = items[: int(count)].T
        read = (end_page - first_page) * grid.page_size
        keys += float(read.sum()) * steps
        pairs += float((read * (end - query)).sum()) * steps
    return _usage(model, tokens, drawn, pairs, keys) + Usage(bytes=steps * _weight_bytes(model))


class Calls:
    """Seconds and usage of calls, those with prompts apart from those that only decode."""

    def __init__(self) -> None:
        self._sums: dict[bool, tuple[int, float, Usage]] = {}

    def add(self, chunks: bool, seconds: float, usage: Usage) -> None:
        """Counts a call."""
        calls, total, used = self._sums.get(chunks, (0, 0.0, Usage()))
        self._sums[chunks] = calls + 1, total + seconds, used + usage

    def figures(self, rates: Rates) -> dict[str, dict[str, float]]:
        """Of both phases: calls, seconds, tokens a call, and the parts of the rates reached."""
        found = {}
        for chunks, (calls, seconds, usage) in sorted(self._sums.items()):
            found["with_prompts" if chunks else "decoding"] = {
                "calls": calls,
                "seconds": round(seconds, 3),
                "tokens_per_call": round(usage.tokens / calls, 1),
                "flop_utilisation": round(usage.flops / rates.flops / seconds, 4),
                "bandwidth_utilisation": round(usage.bytes / rates.bytes / seconds, 4),
                "least_seconds": round(usage.seconds(rates), 3),
            }
        return found
