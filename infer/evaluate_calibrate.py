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

from kvjax.infer.evaluate import Batch, Model, arrays
from kvjax.infer.evaluate_programs import Sizes, answer, extend, prefill
from kvjax.infer.evaluate_suite import Prompt
from kvjax.select import View, WindowKV, evict

__all__ = ["calibrate_shares"]

Array = jax.Array
Progress = Callable[[int, float, np.ndarray], Any]


def calibrate_shares(
    model: Model, prompts: Sequence[Prompt], policy: WindowKV, ratios: Sequence[float], *,
    page_size: int = 4, most_tokens: int = 64, steps: Sequence[float] = (8.0, 4.0, 8.0, 2.0),
    progress: Progress = lambda tried, loss, shares: None,
) -> tuple[tuple[float, ...], ...]:  # fmt: skip
    """Shares of a budget for each layer and KV head, by coordinate descent.

    A head's share is multiplied or divided, and what helps is kept. The loss is the mean negative
    log-likelihood of the whole cache's own answers, over the prompts and the budgets.

    Args:
        model: whose heads.
        prompts: like those to come; all are held in memory at a time.
        policy: whose shares are wanted; each head gets windows of its own. If it has shares, they
            are where the search begins, otherwise equal ones.
        ratios: the budgets to calibrate for.
        page_size: tokens of a page.
        most_tokens: of an answer.
        steps: by which a head's share is multiplied or divided, one for each round of all heads.
        progress: called after each head with the trials so far, the loss and the shares.

    Returns:
        [L][K], the mean 1.
    """
    sizes = Sizes(
        rows=len(prompts), prompt=max(len(p.context) + len(p.question) for p in prompts),
        question=0, answer=most_tokens, page_size=page_size, observed=policy.alpha,
    )  # fmt: skip
    heads = model.config.num_layers, model.config.num_kv_heads
    shares = np.asarray(policy.shares) if policy.budgets == "shares" else np.ones(heads)
    policy = dataclasses.replace(policy, budgets="shares", heads="each", shares=())
    batch = arrays(model, sizes, prompts, "A")
    view, answers = _sample(model, sizes, batch)
    budgets = [np.maximum(ratio * batch.length // page_size, 1) * page_size for ratio in ratios]
    tried = 0

    def loss(shares: np.ndarray) -> float:
        nonlocal tried
        tried += 1
        found = [
            _loss(model.graph, sizes, policy, model.params, view, answers,
                  jnp.asarray(tokens, jnp.int32), jnp.asarray(shares, jnp.float32))
            for tokens in budgets
        ]  # fmt: skip
        return float(np.mean([float(x) for x in found]))

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


def _sample(model: Model, sizes: Sizes, batch: Batch) -> tuple[View, Array]:
    """Prompts and what the whole cache answers, int32[B, W], -1 after an answer's end."""
    filled = prefill(model.graph, sizes, model.params, batch.tokens, batch.length)
    most = jnp.full((sizes.rows,), sizes.answer, jnp.int32)
    pool = jax.tree.map(jnp.copy, filled.pool)
    _, written = answer(
        model.graph, sizes, model.tokenizer.eos_ids, model.params, pool, filled.table,
        filled.token, most,
    )  # fmt: skip
    return View(pool=filled.pool, table=filled.table, seen=filled.seen), written.T


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
