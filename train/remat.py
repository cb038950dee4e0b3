"""What a decoder's layers keep for the backward pass, and what they compute again."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from kvjax.errors import InputError

__all__ = ["REMAT", "layer_remat"]

REMAT = ("none", "dots", "layer")

Wrap = Callable[[Callable], Callable]


def layer_remat(name: str, *, unrolled: bool = False) -> Wrap | None:
    """What `Decoder` wraps each of its layers in.

    Args:
        name: "none" keeps what the backward pass wants: fastest, if memory allows. "dots" keeps the
            results of matrix products and of attention, and computes the rest again, which costs
            little. "layer" keeps the inputs of layers alone and computes them whole again: a third
            more arithmetic, the least memory.
        unrolled: whether the layers are compiled one by one.

    Raises:
        InputError: there is no such name.
    """
    if name not in REMAT:
        raise InputError(f"remat is {name!r}: use one of {', '.join(REMAT)}")
    if name == "none":
        return None
    policy = _keep_products if name == "dots" else None
    # Out of a loop the compiler would merge what is computed again with what was.
    return functools.partial(jax.checkpoint, policy=policy, prevent_cse=unrolled)


def _keep_products(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: whether a result is kept."""
    # cuDNN's attention is a primitive with a name of its own; where it is missing this is harmless.
    attention = "dot_product_attention_fwd" in primitive.name
    return attention or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *_, **params
    )
