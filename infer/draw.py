"""The device's side of sampling: logits and a row's settings in, a token out.

Everything that a request may ask for is data: no option compiles anything. What costs time is
behind a condition, so that a batch pays only for what one of its rows asks for.

Letters: B rows that draw, V vocabulary, Z seats, J tokens with a bias, E tokens that end.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.infer.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS, SamplingParams

__all__ = ["Logprobs", "RowSettings", "draw", "logprobs_of", "settings_of"]

Array = jax.Array

_NO_TOKEN = 2**31 - 1  # dropped wherever it is scattered


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSettings:
    """What the rows asked for, by seat; see `SamplingParams`.

    Attributes:
        temperature, top_p, min_p: float32[Z].
        top_k: int32[Z], 0: all.
        repetition, presence, frequency: float32[Z], the penalties.
        seed: uint32[Z].
        prompt_length: int32[Z], where the answer begins.
        min_length: int32[Z], tokens that end are not drawn for positions before it.
        stop: int32[Z, E], tokens that end the row.
        bias_token: int32[Z, J].
        bias: float32[Z, J].
    """

    temperature: Any
    top_p: Any
    min_p: Any
    top_k: Any
    repetition: Any
    presence: Any
    frequency: Any
    seed: Any
    prompt_length: Any
    min_length: Any
    stop: Any
    bias_token: Any
    bias: Any

    @staticmethod
    def empty(rows: int) -> "RowSettings":
        """Settings of rows that nobody sits on: greedy, nothing else."""

        def full(value: float, dtype: Any, *shape: int) -> np.ndarray:
            return np.full((rows, *shape), value, dtype)

        return RowSettings(
            temperature=full(0, np.float32),
            top_p=full(1, np.float32),
            min_p=full(0, np.float32),
            top_k=full(0, np.int32),
            repetition=full(1, np.float32),
            presence=full(0, np.float32),
            frequency=full(0, np.float32),
            seed=full(0, np.uint32),
            prompt_length=full(0, np.int32),
            min_length=full(0, np.int32),
            stop=full(_NO_TOKEN, np.int32, MAX_STOP_IDS),
            bias_token=full(_NO_TOKEN, np.int32, MAX_LOGIT_BIAS),
            bias=full(0, np.float32, MAX_LOGIT_BIAS),
        )


def settings_of(
    settings: RowSettings, row: int, params: SamplingParams, stop_ids: frozenset[int], prompt: int
) -> None:
    """Fills one row of `RowSettings.empty` (numpy arrays) with what a request asks for."""
    settings.temperature[row] = params.temperature
    settings.top_p[row], settings.min_p[row] = params.top_p, params.min_p
    settings.top_k[row] = params.top_k
    settings.repetition[row] = params.repetition_penalty
    settings.presence[row] = params.presence_penalty
    settings.frequency[row] = params.frequency_penalty
    settings.seed[row] = params.seed or 0
    settings.prompt_length[row] = prompt
    settings.min_length[row] = prompt + params.min_tokens
    settings.stop[row, : len(stop_ids)] = sorted(stop_ids)
    settings.bias_token[row, : len(params.logit_bias)] = list(params.logit_bias)
    settings.bias[row, : len(params.logit_bias)] = list(params.logit_bias.values())


class Logprobs(NamedTuple):
    """Log-probabilities of chosen tokens and of the likeliest ones.

    Attributes:
        chosen: float32[...].
        top_token: int32[..., 20], likeliest first.
        top: float32[..., 20].
    """

    chosen: Array
    top_token: Array
    top: Array


def draw(logits: Array, settings: RowSettings, history: Array, position: Array) -> Array:
    """Chooses a token for each row; a row's choice depends on its own arguments alone.

    Args:
        logits: float32[B, V].
        settings: of these B rows.
        history: int32[B, S], the row's tokens by true position.
        position: int32[B], true position of the token to choose.

    Returns:
        int32[B].
    """
    logits = _adjust(logits, settings, history, position)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(settings.temperature > 0, _sample(logits, settings, position), best)


def _sample(logits: Array, s: RowSettings, position: Array) -> Array:
    hot = s.temperature > 0

    def sampled(logits: Array) -> Array:
        scaled = logits / jnp.where(hot, s.temperature, 1.0)[:, None]
        narrow = (s.top_k > 0) | (s.top_p < 1) | (s.min_p > 0)
        scaled = jax.lax.cond(jnp.any(hot & narrow), _narrow, lambda x, _: x, scaled, s)
        return jax.vmap(_draw_one)(scaled, s.seed, position)

    return jax.lax.cond(jnp.any(hot), sampled, lambda x: jnp.zeros(x.shape[:1], jnp.int32), logits)


def _adjust(logits: Array, s: RowSettings, history: Array, position: Array) -> Array:
    """Bias, tokens that may not end the row yet, penalties: each only if a row asks for it."""
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]

    def biased(logits: Array) -> Array:
        return logits.at[rows, s.bias_token].add(s.bias, mode="drop")

    def unended(logits: Array) -> Array:
        stop = jnp.where((position < s.min_length)[:, None], s.stop, _NO_TOKEN)
        return logits.at[rows, stop].set(-jnp.inf, mode="drop")

    def penalised(logits: Array) -> Array:
        place = jnp.arange(history.shape[1], dtype=jnp.int32)[None]
        live = place < position[:, None]
        answer = live & (place >= s.prompt_length[:, None])
        seen = _count(logits, rows, jnp.where(live, history, _NO_TOKEN)) > 0
        count = _count(logits, rows, jnp.where(answer, history, _NO_TOKEN))
        factor = s.repetition[:, None]
        repeated = jnp.where(logits > 0, logits / factor, logits * factor)
        logits = jnp.where(seen, repeated, logits)
        present = jnp.where(count > 0, s.presence[:, None], 0.0)
        return logits - count * s.frequency[:, None] - present

    punished = (s.repetition != 1) | (s.presence != 0) | (s.frequency != 0)
    for asked, change in (
        (s.bias != 0, biased),
        (position < s.min_length, unended),
        (punished, penalised),
    ):
        logits = jax.lax.cond(jnp.any(asked), change, lambda x: x, logits)
    return logits


def _count(like: Array, rows: Array, tokens: Array) -> Array:
    """How often each token stands in each row, float32[B, V]."""
    return jnp.zeros_like(like).at[rows, tokens].add(1.0, mode="drop")


def _narrow(logits: Array, s: RowSettings) -> Array:
    """Leaves the tokens that min_p, top_k and top_p leave; the others get -inf."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    least = jnp.log(jnp.maximum(s.min_p, jnp.finfo(jnp.float32).tiny))[:, None]
    logits = jnp.where((logits >= top + least) | (s.min_p == 0)[:, None], logits, -jnp.inf)
    k = jnp.where(s.top_k > 0, s.top_k, logits.shape[1]).astype(jnp.float32)
    logits = _most(logits, jnp.ones_like(logits), k)
    return _most(logits, jax.nn.softmax(logits, axis=-1), jnp.where(s.top_p < 1, s.top_p, 2.0))


def _most(logits: Array, weight: Array, enough: Array) -> Array:
    """The fewest largest logits whose weights reach `enough`, ties of the last one included.

    Halving the range of the threshold's bits needs 32 sums over the vocabulary, which is less than
    a sort: floats order as integers do once the negative ones are turned round.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    key = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # the weights from `low` on are enough, those from `high` on are not
        # Halfway without an overflow.
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        reached = jnp.sum(jnp.where(key >= middle[:, None], weight, 0.0), axis=-1) >= enough
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    low = jnp.full(logits.shape[:1], -(2**31), jnp.int32)
    high = jnp.max(key, axis=-1) + 1
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where(key >= low[:, None], logits, -jnp.inf)


def _draw_one(logits: Array, seed: Array, position: Array) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def logprobs_of(logits: Array, chosen: Array) -> Logprobs:
    """Log-probabilities under the model: of the chosen tokens and of the likeliest 20.

    Args:
        logits: float32[n, V].
        chosen: int32[n]; for an entry outside of 0..V-1 anything.
    """
    lse = jax.nn.logsumexp(logits, axis=-1)
    clipped = jnp.clip(chosen, 0, logits.shape[1] - 1)
    own = jnp.take_along_axis(logits, clipped[:, None], axis=-1)[:, 0]
    # A vocabulary of fewer than 20 fills the rest with what it has not.
    top, token = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[1]))
    missing = ((0, 0), (0, MAX_LOGPROBS - token.shape[1]))
    token = jnp.pad(token.astype(jnp.int32), missing, constant_values=-1)
    top = jnp.pad(top - lse[:, None], missing, constant_values=-jnp.inf)
    return Logprobs(own - lse, token, top)
