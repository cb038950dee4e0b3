"""The attention kernel for Hopper: persistent thread blocks that walk over a plan's units.

A thread block is one or two consumer warpgroups, which multiply, and a producer, which copies
pages into a ring in shared memory. Scores and weights never leave the consumers' registers.
Queries lie in shared memory: where they were held in registers, the assembler of CUDA 13.0 gave
queries and weights the same ones if both had the same size, as if queries were not needed again.

All classes of items are in one launch. Half of the thread blocks take them in the opposite order,
so that those that wait for the memory run beside those that multiply.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kvjax.pallas_kernels.page_attention.gpu_consume import consume
from kvjax.pallas_kernels.page_attention.gpu_plan import BLOCK, Mode, Plan
from kvjax.pallas_kernels.page_attention.gpu_produce import produce
from kvjax.pallas_kernels.page_attention.gpu_task import Inputs, Ring, Sizes, i32, share_of

__all__ = ["attend_units"]

Array = jax.Array


def _in_turn(classes: int, run: Any) -> None:
    """Runs the classes one after the other, beginning with another one in every second block."""
    if classes == 1:
        return run(0)

    def step(i: Array, carry: None) -> None:
        which = lax.rem(i + lax.rem(lax.axis_index("block"), i32(2)), i32(classes))
        for number in range(classes):
            pl.when(which == number)(lambda number=number: run(number))

    lax.fori_loop(i32(0), i32(classes), step, None)


def _producer(sizes: Sizes, inputs: Inputs, ring: Ring) -> None:
    produce(sizes, inputs, ring, share_of(sizes, inputs.count[0] * sizes.head_units))
    # The next class uses the same memory: everything must have been consumed.
    for slot in range(sizes.stages):
        plgpu.barrier_wait(ring.k_empty.at[slot])
        plgpu.barrier_wait(ring.v_empty.at[slot])


def _consumer(sizes: Sizes, inputs: Inputs, ring: Ring, me: Array) -> None:
    # The ring begins empty. Where consumers share its places each must say so.
    @pl.when((me == 0) | (sizes.shape.mode is Mode.BLOCKS))
    def _() -> None:
        for slot in range(sizes.stages):
            plgpu.barrier_arrive(ring.k_empty.at[slot])
            plgpu.barrier_arrive(ring.v_empty.at[slot])

    consume(sizes, inputs, ring, share_of(sizes, inputs.count[0] * sizes.head_units), me)


def _body(all_sizes: tuple[Sizes, ...], refs: tuple[Any, ...]) -> None:
    """The kernel; its references are those of `attend_units`, then the memory of `_scratch`."""
    n = len(all_sizes)
    layer, window, q, k, v, pages, position, *rest = refs
    slot_position = None
    if all_sizes[0].tracked:
        slot_position, *rest = rest
    per_class, (out, lse, part, part_lse, queries, *rest) = rest[: 3 * n], rest[3 * n :]
    keys, values, *barriers = rest
    inputs, rings = [], []
    for i in range(n):
        count, units, slot = per_class[3 * i : 3 * i + 3]
        inputs.append(
            Inputs(layer, window, count, q, k, v, pages, units, position, slot_position, slot, out,
                   lse, part, part_lse)
        )  # fmt: skip
        rings.append(Ring(queries, keys[i], values[i], *barriers[4 * i : 4 * i + 4]))
    me, consumers = lax.axis_index("warpgroup"), max(s.consumers for s in all_sizes)

    @pl.when(me == consumers)
    def _() -> None:
        plgpu.set_max_registers(56, action="decrease")
        _in_turn(n, lambda i: _producer(all_sizes[i], inputs[i], rings[i]))

    @pl.when(me < consumers)
    def _() -> None:
        plgpu.set_max_registers(224, action="increase")

        def run(i: int) -> None:
            work = (all_sizes[i], inputs[i], rings[i], me)
            pl.when(me < all_sizes[i].consumers)(lambda: _consumer(*work))

        _in_turn(n, run)


def _scratch(all_sizes: tuple[Sizes, ...], dtype: jnp.dtype) -> list[Any]:
    """Queries; keys and values, of all classes in the same memory; each class's barriers."""
    dim, swizzle = all_sizes[0].dim, all_sizes[0].swizzle
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))

    def memory(*shape: int) -> Any:
        return plgpu.SMEM((*shape, dim), dtype, transforms=transforms)

    consumers = max(sizes.consumers for sizes in all_sizes)
    ring = [memory(sizes.stages, sizes.shape.tile) for sizes in all_sizes]
    barriers = []
    for sizes in all_sizes:
        full = plgpu.Barrier(num_arrivals=sizes.copies, num_barriers=sizes.stages)
        takers = 2 if sizes.shape.mode is Mode.BLOCKS else 1
        empty = plgpu.Barrier(num_arrivals=takers, num_barriers=sizes.stages)
        barriers += [full, full, empty, empty]
    return [memory(consumers, BLOCK), plgpu.RefUnion(*ring), plgpu.RefUnion(*ring), *barriers]


def attend_units(
    all_sizes: tuple[Sizes, ...], layer: Array, window: Array, q: Array, k: Array, v: Array,
    pages: Array, position: Array, plan: Plan, out: Any, lse: Any, part: Any, part_lse: Any,
) -> None:  # fmt: skip
    """Attention of all classes' units; writes outputs and partial results in place.

    Args:
        all_sizes: of each class, static.
        layer: int32[1].
        window: int32[1].
        q: [T, H, D].
        k: [N * R * C, P, D].
        v: [N * R * C, P, D].
        pages: int32[L/R, K/C, B, M].
        position: int32[T].
        plan: the classes' units, and slots' positions.
        out: reference to [T, H * D].
        lse: reference to float32[T, H].
        part: reference to float32[E, H * D].
        part_lse: reference to float32[E, H].
    """

    def page_attention(*refs: Any) -> None:
        _body(all_sizes, refs)

    per_class = [x for c in plan.classes for x in (c.count[None], c.units, c.slot)]
    places = () if plan.position is None else (plan.position,)
    plgpu.kernel(
        page_attention,
        out_type=(),
        scratch_types=_scratch(all_sizes, k.dtype),
        grid=(all_sizes[0].blocks,),
        grid_names=("block",),
        num_threads=max(sizes.consumers for sizes in all_sizes) + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(layer, window, q, k, v, pages, position, *places, *per_class, out, lse, part, part_lse)
