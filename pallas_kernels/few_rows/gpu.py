"""Products of few rows on Hopper GPUs: weights stream through shared memory, once.

Written in Mosaic GPU (`plgpu.kernel`), for bfloat16 and jax 0.11 or later.

Which parts a sum is made of depends on the weights' shape alone, so a row's result does not depend
on how many there are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.devices import HOPPER_MULTIPROCESSORS

__all__ = [
    "DEPTH",
    "MAX_ROWS",
    "Tiling",
    "gated_parts_gpu",
    "product_parts_gpu",
    "tiling_for",
    "why_not",
]

Array = jax.Array

MAX_ROWS: int = 128
"""More of them are bound by arithmetic, not by the weights' bytes."""

DEPTH: int = 64
"""Rows of the weights in a tile."""

# What starting a thread block costs, in tiles of weights.
_START = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a product is cut.

    Attributes:
        columns: of a thread block, a multiple of 64.
        splits: parts of the sum.
        cluster: thread blocks that fetch the left side together, each for all of them.
        resident: thread blocks of a multiprocessor at a time.
    """

    columns: int = 128
    splits: int = 1
    cluster: int = 1
    resident: int = 1

    @property
    def clusters(self) -> int:
        """How many of them run at a time."""
        return HOPPER_MULTIPROCESSORS * self.resident // self.cluster


def why_not(rows: int, depth: int, columns: int, dtypes: tuple[Any, Any]) -> str | None:
    """What keeps the kernel from such a product, or None if nothing does."""
    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__}; it needs 0.11"
    if any(dtype != jnp.bfloat16 for dtype in dtypes):
        return f"{dtypes[0]} by {dtypes[1]}; it takes bfloat16"
    if rows > MAX_ROWS or depth % DEPTH or columns % 64:
        return (
            f"[{rows}, {depth}] by [{depth}, {columns}]; it takes at most {MAX_ROWS} rows and "
            f"multiples of {DEPTH} by 64 weights"
        )
    return None


def tiling_for(depth: int, columns: int) -> Tiling:
    """The cut that gives every multiprocessor about the same to read."""
    width = 64 if columns % 128 else 128
    tiles, steps = columns // width, depth // DEPTH
    most = min(steps, 8)

    def cost(splits: int) -> float:
        turns = -(-tiles * splits // HOPPER_MULTIPROCESSORS)
        return turns * (-(-steps // splits) + _START)

    return Tiling(columns=width, splits=min(range(1, most + 1), key=cost))


def product_parts_gpu(x: Array, w: Array, tiling: Tiling | None = None) -> Array:
    """Parts of a product, to be summed in their order.

    Args:
        x: bfloat16[M, K].
        w: bfloat16[K, N].
        tiling: None: as `tiling_for` says.

    Returns:
        float32[splits, M', N], M' at least M: rows behind M are zero.
    """
    from kvjax.pallas_kernels.few_rows.gpu_stream import stream

    return stream(x, w, tiling or tiling_for(*w.shape), gated=False)


def gated_parts_gpu(x: Array, w: Array, tiling: Tiling | None = None) -> Array:
    """silu(x @ gate) * (x @ up).

    Args:
        x: bfloat16[M, K].
        w: bfloat16[K, 2, F], gate and up.
        tiling: of one split; None: 64 columns of either.

    Returns:
        bfloat16[M', F], M' at least M: rows behind M are zero.
    """
    from kvjax.pallas_kernels.few_rows.gpu_stream import stream

    return stream(x, w.reshape(w.shape[0], -1), tiling or Tiling(), gated=True)
