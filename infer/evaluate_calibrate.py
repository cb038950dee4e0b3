"""Calibration: which layers and heads need how much of the cache, found without labels.

A model uses few of its heads to find things in its context; the others look at what is near, and
what they keep beyond that is wasted. How much each head gets is found by trying: of a few prompts
the answers that the whole cache gives should stay as likely as they were.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.infer.evaluate_programs import Sizes, answer, extend, prefill
from kvjax.models.decoder import DecoderConfig
from kvjax.select import View, WindowKV, evict

__all__ = ["Sample", "calibrate_shares", "sample"]

Array = jax.Array
Progress = Callable[[int, float, np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prefilled batch of prompts, and what the whole cache answers.

    Attributes:
        view: of the cache.
        length: int[B], tokens of the prompts.
        answers: int32[B, W], -1 after an answer's end.
    """

    view: View
    length: np.ndarray
    answers: Array


def sample(
    graph: nnx.GraphDef[Any], sizes: Sizes, stops: tuple[int, ...], params: Any,
    tokens: np.ndarray, length: np.ndarray,
) -> Sample:  # fmt: skip
    """Computes prompts and answers them from the whole cache."""
    filled = prefill(graph, sizes, params, tokens, length)
    most = jnp.full((sizes.rows,), sizes.answer, jnp.int32)
    pool = jax.tree.map(jnp.copy, filled.pool)
    _, written = answer(graph, sizes, stops, params, pool, filled.table, filled.token, most)
    view = View(pool=filled.pool, table=filled.table, seen=filled.seen)
    return Sample(view, length, written.T)


def calibrate_shares(
    graph: nnx.GraphDef[Any], sizes: Sizes, params: Any, samples: Sequence[Sample],
    policy: WindowKV, ratios: Sequence[float], *, steps: Sequence[float] = (8.0, 3.0, 8.0, 1.6),
    progress: Progress = lambda tried, loss, shares: None,
) -> tuple[tuple[float, ...], ...]:  # fmt: skip
    """Shares of a budget for each layer and KV head, by coordinate descent.

    A head's share is multiplied or divided, and what helps is kept. The loss is the mean negative
    log-likelihood of the whole cache's answers, over the samples and the budgets.

    Args:
        graph: of the decoder.
        sizes: of the samples.
        params: of the decoder.
        samples: prompts like those to come.
        policy: with windows of each head's own, whose shares are wanted.
        ratios: the budgets to calibrate for.
        steps: by which a head's share is multiplied or divided, one for each round of all heads.
        progress: called after each trial.

    Returns:
        [L][K], the mean 1.
    """
    config: DecoderConfig = nnx.merge(graph, params).config
    heads = config.num_layers, config.num_kv_heads
    policy = dataclasses.replace(policy, budgets="shares", heads="each", shares=())
    tried = 0

    def loss(shares: np.ndarray) -> float:
        nonlocal tried
        total = 0.0
        for one in samples:
            for ratio in ratios:
                tokens = np.maximum(ratio * one.length // sizes.page_size, 1) * sizes.page_size
                total += float(
                    _loss(graph, sizes, policy, params, one.view, one.answers,
                          jnp.asarray(tokens, jnp.int32), jnp.asarray(shares, jnp.float32))
                )  # fmt: skip
        tried += 1
        return total / (len(samples) * len(ratios))

    shares = np.ones(heads)
    best = loss(shares)
    for step in steps:
        for head in np.ndindex(*heads):
            for factor in (step, 1 / step):
                other = shares.copy()
                other[head] *= factor
                other /= other.mean()
                if (found := loss(other)) < best:
                    best, shares = found, other
                    break
            progress(tried, best, shares)
    return tuple(tuple(round(float(x), 3) for x in row) for row in shares)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _loss(
    graph: nnx.GraphDef[Any], sizes: Sizes, policy: WindowKV, params: Any, view: View,
    answers: Array, tokens: Array, shares: Array,
) -> Array:  # fmt: skip
    """Mean negative log-likelihood of the answers' tokens after the first, nats."""
    decoder = nnx.merge(graph, params)
    keep = dataclasses.replace(policy, shares=shares).keep(view, tokens)
    left = evict(view.pool, view.table, keep, whole_pages=policy.whole_pages, spare=sizes.spare)
    rows, width = answers.shape
    place = jnp.arange(width, dtype=jnp.int32)[None]
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    used = (answers >= 0).reshape(-1)
    row = jnp.where(used, jnp.broadcast_to(row, answers.shape).reshape(-1), rows)
    position = (view.table.position[:, None] + place).reshape(-1)
    first = jnp.arange(rows, dtype=jnp.int32) * width
    count = jnp.sum(answers >= 0, axis=1, dtype=jnp.int32)
    _, _, hidden = extend(
        decoder, sizes, left.pool, left.table, jnp.maximum(answers, 0).reshape(-1), row,
        position, first, first + count, width,
    )  # fmt: skip
    logits = jax.nn.log_softmax(decoder.logits(hidden), axis=-1).reshape(rows, width, -1)
    wanted = jnp.maximum(answers[:, 1:], 0)
    found = jnp.take_along_axis(logits[:, :-1], wanted[..., None], axis=-1)[..., 0]
    weight = (answers[:, 1:] >= 0).astype(jnp.float32)
    # Long answers do not count more than short ones.
    each = jnp.sum(found * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)
    return -jnp.mean(each)
