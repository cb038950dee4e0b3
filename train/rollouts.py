"""Answers drawn from a model to many problems at once, for programs that learn from outcomes.

All rows advance together through a dense cache, in one program: nothing here is shared, answered
early or let in late, so that this is faster than the engine where short answers are wanted by the
hundred thousand, and of no use where anything else is.

Letters: B rows, T tokens, L layers, K KV heads, H query heads, D head size.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.models.decoder import Attend

__all__ = ["make_sampler"]

Array = jax.Array
Sampler = Callable[[Any, Array, Array, Array], Array]


def make_sampler(graph: nnx.GraphDef[Any], end: int, pad: int, temperature: float = 1.0) -> Sampler:
    """A jitted `(params, key, prompts, lengths) -> tokens`.

    The prompts int32[B, T] are padded, of `lengths` int32[B] (1 or more); the tokens int32[B, T]
    begin with them and go on until `end`, padded after it, or until the row is full.

    Args:
        graph: of `nnx.split(decoder)`.
        end: the token that ends an answer.
        pad: what stands behind it.
        temperature: of the draws; above 0.
    """

    @jax.jit
    def sample(params: Any, key: Array, prompts: Array, lengths: Array) -> Array:
        decoder = nnx.merge(graph, params)
        rows, length = prompts.shape
        config = decoder.config
        shape = (config.num_layers, rows, length, config.num_kv_heads, config.head_dim)
        dtype = decoder.norm[...].dtype

        def one(carry: tuple, place: Array) -> tuple[tuple, None]:
            tokens, done, cache = carry
            now = jax.lax.dynamic_index_in_dim(tokens, place, axis=1, keepdims=False)
            position = jnp.full((rows,), place, jnp.int32)
            hidden, cache = decoder(now, position, cache, dense_attend(place))
            logits = decoder.logits(hidden) / temperature
            drawn = jax.random.categorical(jax.random.fold_in(key, place), logits)
            drawn = jnp.where(done, pad, drawn.astype(jnp.int32))
            given = jax.lax.dynamic_index_in_dim(tokens, place + 1, axis=1, keepdims=False)
            answers = place + 1 >= lengths
            new = jnp.where(answers, drawn, given)
            tokens = jax.lax.dynamic_update_index_in_dim(tokens, new, place + 1, axis=1)
            return (tokens, done | (answers & (new == end)), cache), None

        cache = (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        start = (prompts, jnp.zeros((rows,), jnp.bool_), cache)
        places = jnp.arange(length - 1, dtype=jnp.int32)
        (tokens, _, _), _ = jax.lax.scan(one, start, places)
        return tokens

    return sample


def dense_attend(place: Array) -> Attend:
    """Attention of one token a row, at `place`, to those before it; the state is [L, B, T, K, D].

    q is [B, H, D], k and v are [B, K, D].
    """

    def attend(layer: Array, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        state = tuple(
            jax.lax.dynamic_update_slice(kept, new[None, :, None], (layer, 0, place, 0, 0))
            for kept, new in zip(state, (k, v), strict=True)
        )
        keys, values = (jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in state)
        b, h, d = q.shape
        grouped = q.reshape(b, k.shape[1], h // k.shape[1], d)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        if q.dtype == jnp.float32:
            product = functools.partial(product, precision="highest")
        scores = product("bkgd,btkd->bkgt", grouped, keys) * d**-0.5
        seen = jnp.arange(keys.shape[1], dtype=jnp.int32) <= place
        weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -jnp.inf), axis=-1)
        out = product("bkgt,btkd->bkgd", weights.astype(values.dtype), values)
        return out.reshape(b, h, d).astype(q.dtype), state

    return attend
