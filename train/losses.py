"""The loss of language models, without the square of tokens and vocabulary in memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.models.attention import causal_attend
from kvjax.models.decoder import Decoder
from kvjax.train.remat import layer_remat
from kvjax.train.step import Loss, Sums

__all__ = ["cross_entropy", "next_token_loss", "output_kernel"]

Array = jax.Array


def cross_entropy(
    hidden: Array, kernel: Array, targets: Array, weights: Array, chunk: int = 8192
) -> tuple[Array, Array]:
    """The weighted cross-entropy of next tokens, a chunk of tokens at a time.

    The logits of a chunk live only as long as the chunk. Where a gradient is wanted it is made in
    the same pass, since it is known as soon as the logits are: nothing is kept or computed again.

    Args:
        hidden: [B, T, E] normed hidden states, float32 or bfloat16.
        kernel: [E, V] of the output layer, in the same dtype.
        targets: int32[B, T] the tokens to be predicted.
        weights: float32[B, T]; the gradient does not reach them.
        chunk: how many tokens at a time, about.

    Returns:
        Two float32 scalars: the weighted sum of -log p(target), in nats, and the weight of the
        targets that are likelier than every other token.
    """
    sums: Any = _cross_entropy(hidden, kernel, targets, weights, chunk)
    return sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(
    hidden: Array, kernel: Array, targets: Array, weights: Array, chunk: int
) -> tuple[Array, Array]:
    return _sums(hidden, kernel, targets, weights, chunk)


def _sums(
    hidden: Array, kernel: Array, targets: Array, weights: Array, chunk: int
) -> tuple[Array, Array]:
    def add(sums: tuple[Array, Array], part: tuple) -> tuple[tuple[Array, Array], None]:
        x, targets, weights = part
        nats, right, _, _ = _chunk(x, kernel, targets, weights)
        return (sums[0] + nats, sums[1] + right), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, (zero, zero), _chunks(chunk, hidden, targets, weights))[0]


def _sums_and_gradient(
    hidden: Array, kernel: Array, targets: Array, weights: Array, chunk: int
) -> tuple[tuple[Array, Array], tuple]:
    def add(carry: tuple, part: tuple) -> tuple[tuple, Array]:
        nats, right, kernel_grad = carry
        x, targets, weights = part
        part_nats, part_right, logits, lse = _chunk(x, kernel, targets, weights)
        # The gradient of the logits: probabilities, less one at the target.
        ids = jnp.arange(kernel.shape[1], dtype=targets.dtype)[None, None]
        hit = (targets[..., None] == ids).astype(jnp.float32)
        delta = (jnp.exp(logits - lse[..., None]) - hit) * weights[..., None]
        delta = delta.astype(x.dtype)
        kernel_grad += _product("bte,btv->ev", x, delta)
        x_grad = _product("btv,ev->bte", delta, kernel).astype(x.dtype)
        return (nats + part_nats, right + part_right, kernel_grad), x_grad

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(kernel.shape, jnp.float32))
    parts = _chunks(chunk, hidden, targets, weights)
    (nats, right, kernel_grad), x_grad = jax.lax.scan(add, start, parts)
    x_grad = jnp.swapaxes(x_grad, 0, 1).reshape(hidden.shape)
    return (nats, right), (x_grad, kernel_grad.astype(kernel.dtype))


def _times_gradient(chunk: int, grads: tuple, cotangents: tuple[Array, Array]) -> tuple:
    del chunk
    return (*(x * cotangents[0].astype(x.dtype) for x in grads), None, None)


_cross_entropy.defvjp(_sums_and_gradient, _times_gradient)


def _chunk(x: Array, kernel: Array, targets: Array, weights: Array) -> tuple[Array, ...]:
    """Nats and right answers of a chunk [B, t, E], its logits float32[B, t, V] and their lse."""
    logits = _product("bte,ev->btv", x, kernel)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    best = jnp.sum(logits >= target, axis=-1) == 1
    nats = jnp.sum((lse - target[..., 0]) * weights)
    return nats, jnp.sum(jnp.where(best, weights, 0.0)), logits, lse


def _product(equation: str, a: Array, b: Array) -> Array:
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] as [T / t, B, t, ...] with B * t about `chunk`.

    All rows are in every chunk: where devices hold different rows, each has work in each.
    """
    rows, length = arrays[0].shape[:2]
    most = max(1, chunk // rows)
    size = next(size for size in range(min(most, length), 0, -1) if length % size == 0)
    return tuple(
        jnp.swapaxes(x.reshape(rows, length // size, size, *x.shape[2:]), 0, 1) for x in arrays
    )


def output_kernel(decoder: Decoder, dtype: Any) -> Array:
    """The kernel [E, V] that makes logits of hidden states; the embeddings' where they are tied."""
    kernel = decoder.embed[...].T if decoder.head is None else decoder.head.kernel[...]
    return kernel.astype(dtype)


def next_token_loss(
    graph: nnx.GraphDef[Any], *, remat: str = "none", unroll: int | bool = 1, chunk: int = 8192
) -> Loss:
    """The cross-entropy of each next token of a batch int32[B, T + 1]; the metric is `accuracy`.

    Args:
        graph: of the `Decoder`.
        remat: what the layers keep for the backward pass, see `layer_remat`.
        unroll: layers that the compiler sees at a time, see `Decoder`.
        chunk: tokens whose logits are in memory at a time, see `cross_entropy`.
    """
    wrap = layer_remat(remat, unrolled=unroll is not False and unroll != 1)

    def loss(params: nnx.State[Any, Any], tokens: Array) -> Sums:
        decoder = nnx.merge(graph, params)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None], inputs.shape)
        attend = causal_attend(decoder.config.layer_windows())
        hidden, _ = decoder(inputs, positions, (), attend, remat=wrap, unroll=unroll)
        weights = jnp.ones(targets.shape, jnp.float32)
        kernel = output_kernel(decoder, hidden.dtype)
        nats, right = cross_entropy(hidden, kernel, targets, weights, chunk)
        return Sums(nats, jnp.float32(targets.size), {"accuracy": right})

    return loss
