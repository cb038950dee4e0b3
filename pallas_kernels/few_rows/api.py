"""The contract of `product` and `gated_product`."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.devices import on_hopper
from kvjax.pallas_kernels.few_rows.gpu import gated_parts_gpu, product_parts_gpu, why_not
from kvjax.pallas_kernels.few_rows.reference import gated_product_reference, product_reference

__all__ = ["Implementation", "gated_product", "product"]

Array = jax.Array
Implementation = Literal["reference", "gpu"]


def product(x: Array, w: Array, *, implementation: Implementation | None = None) -> Array:
    """The product of so few rows that reading the weights is what takes the time.

    Args:
        x: [..., K].
        w: [K, N].
        implementation: None: the kernel on Hopper GPUs where it fits, else plain XLA.

    Returns:
        x @ w, [..., N] in x's dtype; the kernel sums in float32.

    Raises:
        NotImplementedError: the named implementation cannot do it.
    """
    if _best(x, w, implementation) == "reference":
        return product_reference(x, w)
    rows = math.prod(x.shape[:-1])
    parts = product_parts_gpu(x.reshape(rows, -1), w)
    # One after the other: XLA makes that a part of whatever comes next.
    total = functools.reduce(jnp.add, [parts[i, :rows] for i in range(parts.shape[0])])
    return total.astype(x.dtype).reshape(*x.shape[:-1], -1)


def gated_product(x: Array, w: Array, *, implementation: Implementation | None = None) -> Array:
    """A gated MLP's first half, for as few rows.

    Args:
        x: [..., K].
        w: [K, 2, F], gate and up.
        implementation: as for `product`.

    Returns:
        silu(x @ gate) * (x @ up), [..., F] in x's dtype. The kernel rounds once, at the end.

    Raises:
        NotImplementedError: the named implementation cannot do it.
    """
    if _best(x, w, implementation) == "reference":
        return gated_product_reference(x, w)
    rows = math.prod(x.shape[:-1])
    out = gated_parts_gpu(x.reshape(rows, -1), w)
    return out[:rows].reshape(*x.shape[:-1], -1)


def _best(x: Array, w: Array, implementation: str | None) -> str:
    if implementation == "reference":
        return "reference"
    reason = why_not(math.prod(x.shape[:-1]), w.shape[0], w.shape[-1], (x.dtype, w.dtype))
    if implementation == "gpu" and reason is not None:
        raise NotImplementedError(f"the GPU kernel of few_rows does not take {reason}")
    if implementation not in (None, "gpu"):
        raise NotImplementedError(f"few_rows has no {implementation=}")
    return "gpu" if reason is None and (implementation or on_hopper()) else "reference"
