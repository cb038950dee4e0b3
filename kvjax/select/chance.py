"""Chance and knowledge, the two ends of what a selection can do: random choices and the oracle."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.select.scorer import Scorer
from kvjax.select.view import View

__all__ = ["Oracle", "RandomTokens", "RandomWindows"]

Array = jax.Array


def _noise(view: View, seed: int, size: int) -> Array:
    """A row's own random numbers, float32[L, 1, B, S], equal within windows of `size` slots."""
    layers, _, rows, slots = view.shape
    number = jnp.arange(rows, dtype=jnp.int32) if view.number is None else view.number
    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(number)
    windows = -(-slots // size)
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (layers, windows)))(keys)  # [B, L, W]
    return jnp.repeat(jnp.swapaxes(drawn, 0, 1), size, axis=-1)[:, None, :, :slots]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomTokens(Scorer):
    """Keeps any tokens, others in each layer, and the last ones."""

    last: int = 8
    seed: int = 0

    def scores(self, view: View) -> Array:
        """Random numbers."""
        return jnp.broadcast_to(_noise(view, self.seed, 1), view.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomWindows(Scorer):
    """Keeps any windows of tokens, others in each layer, and the last tokens."""

    window: int = 8
    last: int = 8
    seed: int = 0

    def scores(self, view: View) -> Array:
        """Random numbers, one a window; the last window that fits may be cut."""
        return jnp.broadcast_to(_noise(view, self.seed, self.window), view.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(Scorer):
    """Knows what the answer needs (`View.needles`) and keeps that, the ends, and what is recent."""

    sinks: int = 4
    last: int = 8

    def scores(self, view: View) -> Array:
        """The needles, then what is recent."""
        if view.needles is None:
            raise ValueError("the oracle needs View.needles: which slots hold what is asked for")
        place = view.slot.astype(jnp.float32) / view.shape[-1]
        return jnp.broadcast_to(place + view.needles[None, None].astype(jnp.float32), view.shape)
