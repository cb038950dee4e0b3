"""Calibration of foresight: which tokens answers will look at, told from the cached values alone.

The last queries of a prompt cannot see what is looked for while the answer is written: the second
link of a chain, the next number of a list. But a head looks at few kinds of tokens, and a token's
value says of which kind it is. So whether an answer's tokens attend to a token is fitted by a
logistic regression on its value, a head at a time; KVzap (2026) fits KVzip's scores to hidden
states in this way. Prompts with their answers are all that is needed, once a model.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.infer.evaluate import Model
from kvjax.infer.evaluate_programs import Prefilled, Sizes, prefill
from kvjax.infer.evaluate_suite import Prompt
from kvjax.select import View

__all__ = ["calibrate_foresight"]

Array = jax.Array
Foresight = tuple[tuple[tuple[float, ...], ...], ...]

_ENOUGH = 0.1
"""A token that gets so much attention is needed; of less, that part."""
_STEPS = 8


def calibrate_foresight(
    model: Model, batches: Iterable[Sequence[Prompt]], *, page_size: int = 4, ridge: float = 3.0
) -> Foresight:
    """The weights of each layer's and KV head's values; see `WindowKV.foresight`.

    Args:
        model: whose heads.
        batches: prompts of one length, as many in each batch; their first answers are read.
        page_size: tokens of a page.
        ridge: the weights' squares count so much.

    Returns:
        [L][K][D + 1].
    """
    found = [_examples(model, prompts, page_size) for prompts in batches]
    weights = [
        [
            _logistic(
                np.concatenate([values[layer, head] for values, _ in found]),
                np.concatenate([targets[layer, head] for _, targets in found]),
                ridge,
            )
            for head in range(model.config.num_kv_heads)
        ]
        for layer in range(model.config.num_layers)
    ]
    return tuple(tuple(tuple(round(float(x), 4) for x in w) for w in heads) for heads in weights)


def _logistic(values: np.ndarray, target: np.ndarray, ridge: float) -> np.ndarray:
    """Newton's method for the log-odds of targets in [0, 1], linear in float[n, D]: [D + 1]."""
    ones = np.ones((len(values), 1), np.float32)
    features = np.concatenate([values.astype(np.float32), ones], axis=1)
    weights = np.zeros(features.shape[1], np.float32)
    for _ in range(_STEPS):
        odds = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        slope = features.T @ (odds - target) + ridge * weights
        curve = (features * (odds * (1 - odds))[:, None]).T @ features
        weights -= np.linalg.solve(curve + ridge * np.eye(len(weights)), slope).astype(np.float32)
    return weights


def _examples(
    model: Model, prompts: Sequence[Prompt], page_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Values of the contexts' tokens, float16[L, K, n, D], and their targets, float32[L, K, n]."""
    answers = [model.tokenizer.encode(p.answers[0], add_special=False) for p in prompts]
    whole = [
        np.concatenate([p.context, p.question, np.asarray(answer, np.int32)])
        for p, answer in zip(prompts, answers, strict=True)
    ]
    observed = -(-max(map(len, answers)) // 64) * 64
    longest = -(-max(map(len, whole)) // 128) * 128
    sizes = Sizes(
        rows=len(prompts), prompt=longest, question=0, answer=1, page_size=page_size,
        observed=observed,
    )  # fmt: skip
    tokens = np.stack([np.pad(ids, (0, longest - len(ids))) for ids in whole])
    length = np.asarray([len(ids) for ids in whole], np.int32)
    filled = prefill(model.graph, sizes, model.params, tokens, length)
    start = jnp.asarray(length - [len(answer) for answer in answers], jnp.int32)
    layers = [_layer(filled, jnp.int32(layer), start) for layer in range(model.config.num_layers)]
    slots = np.arange(layers[0][1].shape[-1])[None]
    context = slots < np.asarray([len(p.context) for p in prompts])[:, None]
    values = np.stack([np.asarray(v, np.float16)[:, context] for v, _ in layers])
    return values, np.stack([np.asarray(target)[:, context] for _, target in layers])


@jax.jit
def _layer(filled: Prefilled, layer: Array, start: Array) -> tuple[Array, Array]:
    """A layer's values [K, B, S, D], and the most attention that answers pay, [K, B, S], scaled."""
    seen = filled.seen
    view = View(pool=filled.pool, table=filled.table, seen=seen)
    keys, values = view.keys(layer), view.values(layer)
    heads, _, _, d = keys.shape
    q = seen.q[layer].astype(jnp.float32)
    q = q.reshape(*q.shape[:2], heads, -1, d)
    score = jnp.einsum("bakgd,kbsd->kbags", q, keys, precision="highest") * d**-0.5
    lse = seen.lse[layer].reshape(*q.shape[:-1])
    attention = jnp.exp(score - jnp.moveaxis(lse, 2, 0)[..., None])
    answers = (seen.position >= start[:, None])[None, :, :, None, None]
    most = jnp.max(jnp.where(answers, attention, 0.0), axis=(2, 3))
    return values, jnp.minimum(most / _ENOUGH, 1.0)
