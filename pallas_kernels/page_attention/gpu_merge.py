"""The kernel that merges partial results, each query's in the order of its items."""

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kvjax.pallas_kernels.page_attention.gpu_rows import load_head_values, store_head_values

__all__ = ["merge_partials"]

Array = jax.Array

_WARPGROUPS = 4
# Partial results that are loaded at once, to hide the memory's latency.
_AT_ONCE = 8
_LOWEST = -1e30


def _merge_heads(
    refs: tuple[Any, ...], query: Array, start: Array, many: Array, column: Array, *, heads: int,
    dim: int, size: int, width: int,
) -> None:  # fmt: skip
    """Merges `size` of one query's values."""
    out, lse, part, part_lse = refs
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=width)
    zeros = plgpu.layout_cast(jnp.zeros((size,), jnp.float32), layout)
    columns = pl.ds(pl.multiple_of(column, size), size)

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        summed, total, top = carry
        numbers = [i * _AT_ONCE + u for u in range(_AT_ONCE)]
        slots = [start + jnp.minimum(number, many - 1) for number in numbers]
        exponents = [
            load_head_values(part_lse, s, column, heads=heads, dim=dim, size=size, width=width)
            for s in slots
        ]
        # jax 0.10 wants the index beside the reference; it is not for these kernels.
        values = [
            plgpu.load(part.at[s, columns], layout=layout)  # pyright: ignore[reportCallIssue]
            for s in slots
        ]
        for number, exponent, value in zip(numbers, exponents, values, strict=True):
            exponent = exponent + jnp.where(number < many, 0.0, -jnp.inf)
            higher = jnp.maximum(top, exponent)
            old, new = jnp.exp(top - higher), jnp.exp(exponent - higher)
            summed, total, top = summed * old + value * new, total * old + new, higher
        return summed, total, top

    steps = lax.div(many + _AT_ONCE - 1, jnp.int32(_AT_ONCE))
    summed, total, top = lax.fori_loop(jnp.int32(0), steps, step, (zeros, zeros, zeros + _LOWEST))
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out[query, columns] = (summed / total).astype(out.dtype)
    merged = jnp.where(some, top + jnp.log(total), -jnp.inf)
    store_head_values(lse, merged, query, column, heads=heads, dim=dim, width=width)


def merge_partials(
    merge: Array, count: Array, out: Any, lse: Any, part: Any, part_lse: Any, *, blocks: int
) -> None:
    """Merges the queries' partial results into the output, in place.

    Args:
        merge: int32[T, 3]: query, first partial result, how many.
        count: int32[1], how many of the T there are.
        out: reference to [T, H * D].
        lse: reference to float32[T, H].
        part: reference to float32[E, H * D].
        part_lse: reference to float32[E, H].
        blocks: thread blocks, static.
    """
    heads, all_values = lse.shape[1], out.shape[1]
    dim = all_values // heads
    width = math.gcd(all_values // 128, 4)
    size = 128 * width

    def page_attention_merge(*refs: Any) -> None:
        merge, count = refs[:2]
        shares = all_values // size
        me = lax.axis_index("block") * _WARPGROUPS + lax.axis_index("warpgroup")
        everyone = blocks * _WARPGROUPS
        total = count[0] * shares
        mine = lax.div(total - me + everyone - 1, jnp.int32(everyone))

        def entry(turn: Array) -> tuple[Array, Array, Array]:
            """Query, first partial result and how many; of the turn after the last one too."""
            number = jnp.minimum(me + turn * everyone, total - 1)
            number = lax.div(jnp.maximum(number, 0), jnp.int32(shares))
            return merge[number, 0], merge[number, 1], merge[number, 2]

        def body(turn: Array, present: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            following = entry(turn + 1)  # read while this one is merged
            share = lax.rem(me + turn * everyone, jnp.int32(shares))
            _merge_heads(
                refs[2:], *present, share * size, heads=heads, dim=dim, size=size, width=width
            )
            return following

        lax.fori_loop(jnp.int32(0), mine, body, entry(jnp.int32(0)))

    plgpu.kernel(
        page_attention_merge,
        out_type=(),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(merge, count, out, lse, part, part_lse)
