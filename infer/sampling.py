"""How the next token is chosen."""

import dataclasses

import jax
import jax.numpy as jnp

__all__ = ["SamplingParams", "sample"]

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt.

    Attributes:
        max_tokens: the most tokens to generate; None: until the model's context is full.
        temperature: 0 takes the likeliest token; 1 draws from the model's distribution.
        top_p: draw only from the likeliest tokens whose probabilities together reach it.
        seed: of the draws. They depend on it and on the position in the sequence, on nothing
            else; None gives every prompt of a call a seed of its own, its place in the call.
        ignore_eos: go on after the model's end token.
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, not {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 4294967295, not {self.seed}")


def sample(logits: Array, temperature: Array, top_p: Array, seed: Array, position: Array) -> Array:
    """Chooses a token for each row; a row's choice depends on its own arguments alone.

    Args:
        logits: float32[B, V].
        temperature: float32[B], 0 for the likeliest token.
        top_p: float32[B].
        seed: uint32[B].
        position: int32[B], true position of the token to choose.

    Returns:
        int32[B].
    """

    def draw(_: None) -> Array:
        scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        scaled = jax.lax.cond(jnp.any(top_p < 1), _nucleus, lambda x, _: x, scaled, top_p)
        return jax.vmap(_draw_one)(scaled, seed, position)

    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = jax.lax.cond(jnp.any(temperature > 0), draw, lambda _: likeliest, None)
    return jnp.where(temperature > 0, drawn, likeliest)


def _nucleus(logits: Array, top_p: Array) -> Array:
    """Removes what lies beyond the likeliest tokens that reach top_p (Holtzman et al. 2020)."""
    ordered = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    inside = before < top_p[:, None]
    least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _draw_one(logits: Array, seed: Array, position: Array) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.categorical(key, logits).astype(jnp.int32)
