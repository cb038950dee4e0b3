"""The kernel of few_rows for Hopper: a ring of weights in shared memory.

A thread block makes a tile of columns from a part of the weights' rows. Its producer copies tiles
of weights and of the left side into a ring, deep enough that the memory never waits; one consumer
for every 64 rows of the left side multiplies them.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kvjax.pallas_kernels.few_rows.gpu import DEPTH, Tiling

__all__ = ["stream"]

Array = jax.Array

_ROWS = 64  # of a consumer
_RING_BYTES = 200 * 1024


def stream(x: Array, w: Array, tiling: Tiling, *, gated: bool) -> Array:
    """Multiplies.

    Args:
        x: bfloat16[M, K].
        w: bfloat16[K, N], or, gated, gate and up side by side.
        tiling: of the product.
        gated: whether to return silu(gate) * up and not the parts of a sum.

    Returns:
        float32[splits, M', N], or, gated, bfloat16[M', N / 2]; M' is M rounded up to 64.
    """
    (rows, depth), width = x.shape, w.shape[1]
    consumers = -(-rows // _ROWS)
    padded = consumers * _ROWS
    panels = 2 if gated else 1
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    if gated:
        out = jax.ShapeDtypeStruct((padded, width // 2), x.dtype)
    else:
        out = jax.ShapeDtypeStruct((tiling.splits, padded, width), jnp.float32)
    groups = width // (tiling.columns * tiling.cluster) * tiling.splits
    stages = min(
        _RING_BYTES // tiling.resident // (2 * DEPTH * (padded + tiling.columns)), depth // DEPTH
    )
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def few_rows(*refs: Any) -> None:
        member = lax.axis_index("member") if tiling.cluster > 1 else jnp.int32(0)
        _Block(tiling, gated, consumers, groups, member, *refs).run()

    empty = plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)
    clusters: dict[str, Any] = {}
    if tiling.cluster > 1:
        empty = plgpu.ClusterBarrier(
            collective_axes=("member",), num_arrivals=consumers, num_barriers=stages
        )
        clusters = {"cluster": (tiling.cluster,), "cluster_names": ("member",)}
    return plgpu.kernel(
        few_rows,
        out_type=out,
        scratch_types=[
            plgpu.SMEM((stages, padded, DEPTH), x.dtype, transforms=swizzled),
            plgpu.SMEM(
                (stages, panels, DEPTH, tiling.columns // panels), w.dtype, transforms=swizzled
            ),
            plgpu.Barrier(num_arrivals=panels + 1, num_barriers=stages),
            empty,
        ],
        grid=(min(groups, tiling.clusters),),
        grid_names=("block",),
        **clusters,
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
    )(x, w)


@dataclasses.dataclass(frozen=True)
class _Block:
    """A thread block: its references, in global memory and then in shared memory.

    Attributes:
        tiling: static.
        gated: whether the columns are half gate, half up.
        consumers: how many.
        groups: of thread blocks' work, in all.
        member: int32, of the cluster.
        x: [M, K].
        w: [K, N].
        out: float32[splits, M, N] or, gated, [M, F].
        left: [stages, M, 64].
        weights: [stages, 64, columns].
        full: barriers, one a stage.
        empty: likewise.
    """

    tiling: Tiling
    gated: bool
    consumers: int
    groups: int
    member: Any
    x: Any
    w: Any
    out: Any
    left: Any
    weights: Any
    full: Any
    empty: Any

    def run(self) -> None:
        me = lax.axis_index("warpgroup")
        pl.when(me == self.consumers)(self._produce)
        pl.when(me < self.consumers)(lambda: self._consume(me))

    @property
    def _stages(self) -> int:
        return self.left.shape[0]

    def _slot(self, number: Array) -> Array:
        return lax.rem(number, jnp.int32(self._stages))

    def _each_unit(self, unit: Any) -> Array:
        """unit(tile of columns, part, first step, end, tiles so far) -> tiles so far."""
        blocks = min(self.groups, self.tiling.clusters)
        block, splits = lax.axis_index("block"), self.tiling.splits
        steps, across = self.x.shape[1] // DEPTH, jnp.int32(self.groups // splits)
        turns = lax.div(self.groups - block + (blocks - 1), jnp.int32(blocks))

        def turn(i: Array, number: Array) -> Array:
            group = block + i * blocks
            tile = lax.rem(group, across) * self.tiling.cluster + self.member
            part = lax.div(group, across)
            first, end = (lax.div((part + j) * steps, jnp.int32(splits)) for j in (0, 1))
            return unit(tile, part, first, end, number)

        return lax.fori_loop(jnp.int32(0), turns, turn, jnp.int32(0))

    def _produce(self) -> None:
        together = "member" if self.tiling.cluster > 1 else None

        def unit(tile: Array, part: Array, first: Array, end: Array, number: Array) -> Array:
            def step(k: Array, number: Array) -> Array:
                slot, deep = self._slot(number), pl.ds(k * DEPTH, DEPTH)
                # The ring begins empty.
                pl.when(number >= self._stages)(lambda: plgpu.barrier_wait(self.empty.at[slot]))
                full = self.full.at[slot]
                for panel, columns in enumerate(self._columns(tile)):
                    plgpu.copy_gmem_to_smem(
                        self.w.at[deep, columns], self.weights.at[slot, panel], full
                    )
                plgpu.copy_gmem_to_smem(
                    self.x.at[:, deep], self.left.at[slot], full, collective_axes=together
                )
                return number + 1

            return lax.fori_loop(first, end, step, number)

        number = self._each_unit(unit)
        # Nobody leaves while its neighbours may still write to it.
        for slot in range(self._stages):
            pl.when(slot < number)(lambda slot=slot: plgpu.barrier_wait(self.empty.at[slot]))

    def _columns(self, tile: Array) -> list[Any]:
        """Where a tile's panels lie."""
        _, panels, _, width = self.weights.shape
        return [pl.ds(i * (self.w.shape[1] // panels) + tile * width, width) for i in range(panels)]

    def _consume(self, me: Array) -> None:
        rows = pl.ds(me * _ROWS, _ROWS)
        _, panels, _, width = self.weights.shape

        def unit(tile: Array, part: Array, first: Array, end: Array, number: Array) -> Array:
            def product(*sums: Any) -> tuple[tuple[Array, ...], Array]:
                def step(k: Array, number: Array) -> Array:
                    slot = self._slot(number)
                    plgpu.barrier_wait(self.full.at[slot])
                    for panel, total in enumerate(sums):
                        left, right = self.left.at[slot, rows], self.weights.at[slot, panel]
                        plgpu.wgmma(total, left, right)
                    plgpu.wgmma_wait(len(sums))
                    pl.when(k > first)(lambda: self._free(number - 1))
                    return number + 1

                after = lax.fori_loop(first, end, step, number)
                plgpu.wgmma_wait(0)
                self._free(after - 1)
                return tuple(total[...] for total in sums), after

            sums, after = pl.run_scoped(
                product, *[plgpu.WGMMAAccumulatorRef((_ROWS, width))] * panels
            )
            self._store(sums, rows, tile, part)
            return after

        self._each_unit(unit)

    def _free(self, number: Array) -> None:
        plgpu.barrier_arrive(self.empty.at[self._slot(number)])

    def _store(self, sums: tuple[Array, ...], rows: Any, tile: Array, part: Array) -> None:
        width = self.weights.shape[3]
        columns = pl.ds(tile * width, width)
        if not self.gated:
            self.out[part, rows, columns] = sums[0]
            return
        gate, up = sums
        self.out[rows, columns] = (gate / (1 + jnp.exp(-gate)) * up).astype(self.out.dtype)
