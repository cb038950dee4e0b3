"""The attention kernel for Hopper: persistent thread blocks that walk over a plan's units.

A thread block is a producer warpgroup, which copies pages into a ring in shared memory, and one
or two consumers, which multiply. Scores and weights never leave the consumers' registers. Queries
lie in shared memory: where they were held in registers, the assembler of CUDA 13.0 gave queries
and weights the same ones if both had the same size, as if queries were not needed again.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from kvjax.pallas_kernels.page_attention.gpu_consume import consume
from kvjax.pallas_kernels.page_attention.gpu_plan import BLOCK, Mode
from kvjax.pallas_kernels.page_attention.gpu_produce import produce
from kvjax.pallas_kernels.page_attention.gpu_task import Inputs, Ring, Sizes, share_of

__all__ = ["attend_units"]

Array = jax.Array


def _body(sizes: Sizes, *refs: Any) -> None:
    inputs, ring = Inputs(*refs[:14]), Ring(*refs[14:])
    me = lax.axis_index("warpgroup")
    turns = share_of(sizes, inputs.count[0] * sizes.head_units)

    @pl.when(me == sizes.consumers)
    def _() -> None:
        plgpu.set_max_registers(56, action="decrease")
        produce(sizes, inputs, ring, turns)

    @pl.when(me < sizes.consumers)
    def _() -> None:
        plgpu.set_max_registers(224, action="increase")

        # The ring begins empty. Where consumers share its places each must say so.
        @pl.when((me == 0) | (sizes.shape.mode is Mode.BLOCKS))
        def _() -> None:
            for slot in range(sizes.stages):
                plgpu.barrier_arrive(ring.k_empty.at[slot])
                plgpu.barrier_arrive(ring.v_empty.at[slot])

        consume(sizes, inputs, ring, turns, me)


def attend_units(
    sizes: Sizes, layer: Array, window: Array, count: Array, q: Array, k: Array, v: Array,
    pages: Array, units: Array, position: Array, slot: Array, out: Any, lse: Any, part: Any,
    part_lse: Any,
) -> None:  # fmt: skip
    """Attention of a class's units; writes outputs and partial results in place.

    Args:
        sizes: static.
        layer: int32[1].
        window: int32[1].
        count: int32[1], how many units there are.
        q: [T, H, D].
        k: [N * R * C, P, D].
        v: [N * R * C, P, D].
        pages: int32[L/R, K/C, B, M].
        units: int32[L/R, K/C, U, F].
        position: int32[T].
        slot: int32[I * Q].
        out: reference to [T, H * D].
        lse: reference to float32[T, H].
        part: reference to float32[E, H * D].
        part_lse: reference to float32[E, H].
    """
    tile, dim, stages = sizes.shape.tile, sizes.dim, sizes.stages
    transforms = (
        plgpu.TilingTransform((8, sizes.swizzle // 2)),
        plgpu.SwizzleTransform(sizes.swizzle),
    )
    queries = plgpu.SMEM((sizes.consumers, BLOCK, dim), q.dtype, transforms=transforms)
    buffer = plgpu.SMEM((stages, tile, dim), k.dtype, transforms=transforms)
    full = plgpu.Barrier(num_arrivals=sizes.copies, num_barriers=stages)
    takers = 2 if sizes.shape.mode is Mode.BLOCKS else 1
    empty = plgpu.Barrier(num_arrivals=takers, num_barriers=stages)

    def page_attention(*refs: Any) -> None:
        _body(sizes, *refs)

    plgpu.kernel(
        page_attention,
        out_type=(),
        scratch_types=[queries, buffer, buffer, full, full, empty, empty],
        grid=(sizes.blocks,),
        grid_names=("block",),
        num_threads=sizes.consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(layer, window, count, q, k, v, pages, units, position, slot, out, lse, part, part_lse)
