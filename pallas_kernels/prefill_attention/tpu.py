"""JAX's splash attention for TPU, with gradients."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

__all__ = ["fits_splash", "prefill_attention_splash"]

Array = jax.Array

_LANES = 128


def fits_splash(q: Array) -> bool:
    """Whether it takes queries [B, T, H, D]."""
    return q.shape[1] % _LANES == 0


def prefill_attention_splash(
    q: Array, k: Array, v: Array, window: int, scale: float, interpret: bool = False
) -> tuple[Array, Array]:
    """See `api.prefill_attention`."""
    return _splash(q, k, v, window, scale, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _splash(
    q: Array, k: Array, v: Array, window: int, scale: float, interpret: bool
) -> tuple[Array, Array]:
    return _with_lse(q, k, v, window, scale, interpret)


def _with_lse(
    q: Array, k: Array, v: Array, window: int, scale: float, interpret: bool
) -> tuple[Array, Array]:
    kernel = _kernel(q, window, save_residuals=True, interpret=interpret)
    out, (lse,) = jax.vmap(kernel)(*_by_head(q, k, v, scale))
    return _by_token(out, q), jnp.swapaxes(lse, 1, 2)


def _forward(
    q: Array, k: Array, v: Array, window: int, scale: float, interpret: bool
) -> tuple[tuple[Array, Array], Callable[..., Any]]:
    def attend(q: Array, k: Array, v: Array) -> Array:
        kernel = _kernel(q, window, save_residuals=False, interpret=interpret)
        return _by_token(jax.vmap(kernel)(*_by_head(q, k, v, scale)), q)

    out, backward = jax.vjp(attend, q, k, v)
    # The kernel that has a gradient does not give the lse. Where nobody asks for it, as in
    # training, the second one is not run.
    _, lse = _with_lse(q, k, v, window, scale, interpret)
    return (out, lse), backward


def _backward(
    window: int, scale: float, interpret: bool, backward: Callable[..., Any],
    gradients: tuple[Array, Array],
) -> tuple[Array, Array, Array]:  # fmt: skip
    return backward(gradients[0])


_splash.defvjp(_forward, _backward)


def _kernel(q: Array, window: int, *, save_residuals: bool, interpret: bool) -> Callable[..., Any]:
    length, heads = q.shape[1:3]
    shape = (length, length)
    mask = (
        splash.LocalMask(shape, (window - 1, 0), offset=0) if window else splash.CausalMask(shape)
    )
    return splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([mask] * heads), save_residuals=save_residuals,
        interpret=interpret,
    )  # fmt: skip


def _by_head(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, ...]:
    """[B, heads, T, D], D filled up to whole lanes."""
    q = q * jnp.asarray(scale, q.dtype)
    padding = ((0, 0), (0, 0), (0, 0), (0, -q.shape[-1] % _LANES))
    return tuple(jnp.pad(jnp.swapaxes(x, 1, 2), padding) for x in (q, k, v))


def _by_token(out: Array, q: Array) -> Array:
    return jnp.swapaxes(out, 1, 2)[..., : q.shape[-1]].astype(q.dtype)
