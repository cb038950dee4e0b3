"""Rows of an item between global memory and the registers that a matrix product wants.

A row is a (query, query head) pair: row m of an item is query `first + m // group` and, of the KV
head's query heads, number `m % group`. No slice or copy of Pallas reaches such rows, so here each
thread computes the addresses of its own two rows. Rows that an item does not have are read as its
last one and not written.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir.dialects import gpu, llvm  # jax.extend has only the other dialects
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf, vector

__all__ = ["load_head_values", "load_per_row", "load_rows", "store_head_values", "store_rows"]

Array = jax.Array

ROWS = 64
_SCALAR = plgpu.Layout.WG_SPLAT(())
_MATRIX, _COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)


def _int(value: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _scalar(value: mgpu.FragmentedArray) -> ir.Value:
    return value.registers.item()


def _thread() -> ir.Value:
    """The thread's number in its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.remui(arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x)), _int(128))


def _own_rows() -> tuple[ir.Value, ir.Value]:
    """The two rows of 64 of which this thread holds parts, in a matrix product's layout."""
    thread = _thread()
    warp, lane = arith.divui(thread, _int(32)), arith.remui(thread, _int(32))
    low = arith.addi(arith.muli(warp, _int(16)), arith.divui(lane, _int(4)))
    return low, arith.addi(low, _int(8))


def _own_column() -> ir.Value:
    """The first of this thread's two columns in each group of eight."""
    return arith.muli(arith.remui(_thread(), _int(4)), _int(2))


def _pointer(ref: ir.Value, offset: ir.Value, dtype: ir.Type) -> ir.Value:
    wide = arith.extsi(ir.IntegerType.get_signless(64), offset)
    return utils.getelementptr(utils.memref_ptr(ref), [wide], dtype)


def _place(row: ir.Value, first: ir.Value, group: int) -> tuple[ir.Value, ir.Value]:
    """The query of a row, and which of the KV head's query heads it is."""
    query = arith.addi(first, arith.divui(row, _int(group)))
    return query, arith.remui(row, _int(group))


def _registers(layout: Any, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Each register's index, which of the two rows it is of, and which group of eight columns."""
    sizes = layout.registers_shape(shape)
    half_axis = 4 if len(shape) == 2 else 2
    for index in np.ndindex(sizes):
        yield index, index[half_axis], index[1] if len(shape) == 2 else 0


def load_rows(
    q: Any, first: Array, head: Array, row: Array, rows: Array, *, group: int, heads: int, dim: int
) -> Array:
    """64 rows of q, [64, D].

    Args:
        q: reference to [T, H, D].
        first: the item's first query.
        head: the first query head of the KV head.
        row: the first of the rows.
        rows: how many the item has.
        group: H / K.
        heads: H.
        dim: D.
    """
    layout = fragmented_array.WGMMA_LAYOUT
    result = plgpu.ShapeDtypeStruct((ROWS, dim), q.dtype, layout=_MATRIX)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(_SCALAR,) * 4), return_type=result)
    def load(ctx: Any, q: Any, *scalars: Any) -> Any:
        first, head, row, rows = (_scalar(s) for s in scalars)
        element = ir.MemRefType(q.type).element_type
        pair = ir.VectorType.get((2,), element)
        starts = []
        for own in _own_rows():
            own = arith.minui(arith.addi(own, row), arith.subi(rows, _int(1)))
            query, number = _place(own, first, group)
            place = arith.addi(arith.muli(query, _int(heads)), arith.addi(head, number))
            starts.append(arith.addi(arith.muli(place, _int(dim)), _own_column()))
        registers = np.empty(layout.registers_shape((ROWS, dim)), dtype=object)
        for index, half, eight in _registers(layout, (ROWS, dim)):
            offset = arith.addi(starts[half], _int(8 * eight))
            registers[index] = llvm.load(pair, _pointer(q, offset, element), alignment=4)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(q, first, head, row, rows)


def load_per_row(values: Any, first: Array, row: Array, rows: Array, *, group: int) -> Array:
    """An int32 of each of 64 rows' queries, [64].

    Args:
        values: reference to int32[T].
        first: the item's first query.
        row: the first of the rows.
        rows: how many the item has.
        group: H / K.
    """
    layout = fragmented_array.WGMMA_ROW_LAYOUT
    result = plgpu.ShapeDtypeStruct((ROWS,), jnp.int32, layout=_COLUMN)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(_SCALAR,) * 3), return_type=result)
    def load(ctx: Any, values: Any, *scalars: Any) -> Any:
        first, row, rows = (_scalar(s) for s in scalars)
        i32 = ir.IntegerType.get_signless(32)
        loaded = []
        for own in _own_rows():
            own = arith.minui(arith.addi(own, row), arith.subi(rows, _int(1)))
            query, _ = _place(own, first, group)
            loaded.append(llvm.load(i32, _pointer(values, query, i32)))
        registers = np.empty(layout.registers_shape((ROWS,)), dtype=object)
        for index, half, _ in _registers(layout, (ROWS,)):
            registers[index] = vector.broadcast(ir.VectorType.get((1,), i32), loaded[half])
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return load(values, first, row, rows)


def _when(condition: ir.Value, body: Callable[[], None]) -> None:
    branch = scf.IfOp(condition)
    with ir.InsertionPoint(branch.then_block):
        body()
        scf.yield_([])


def store_rows(
    out: Any, lse: Any, slot: Any, values: Array, lse_values: Array, first: Array, head: Array,
    row: Array, rows: Array, *, group: int, heads: int, dim: int,
) -> None:  # fmt: skip
    """Writes 64 rows and their lse.

    Args:
        out: reference to [T, H * D], or of partial results [E, H * D].
        lse: reference to float32[T, H] or [E, H].
        slot: reference to int32[E'], where `first` is the place of the item's first query and
            says where each goes, -1: nowhere; None: a query goes to its own place.
        values: [64, D].
        lse_values: float32[64].
        first: the item's first query, or its place in `slot`.
        head: the first query head of the KV head.
        row: the first of the rows.
        rows: how many the item has.
        group: H / K.
        heads: H.
        dim: D.
    """
    refs = (out, lse) if slot is None else (out, lse, slot)
    types = (*(plgpu.RefType(),) * len(refs), _MATRIX, _COLUMN, *(_SCALAR,) * 4)

    @plgpu.inline_mgpu(arg_types=types)
    def store(ctx: Any, *arguments: Any) -> None:
        out, lse, *slot = arguments[: len(refs)]
        values, lse_values, *scalars = arguments[len(refs) :]
        first, head, row, rows = (_scalar(s) for s in scalars)
        i32 = ir.IntegerType.get_signless(32)
        element, single = values.mlir_dtype, lse_values.mlir_dtype
        width = 2 * utils.bitwidth(element) // 8

        def write(half: int, query: ir.Value, number: ir.Value) -> None:
            place = arith.addi(arith.muli(query, _int(heads)), arith.addi(head, number))
            start = arith.addi(arith.muli(place, _int(dim)), _own_column())
            for index, of, eight in _registers(values.layout, (ROWS, dim)):
                if of == half:
                    offset = arith.addi(start, _int(8 * eight))
                    pointer = _pointer(out, offset, element)
                    llvm.store(values.registers[index], pointer, alignment=width)
            for index, of, _ in _registers(lse_values.layout, (ROWS,)):
                if of == half:
                    value = vector.extract(
                        lse_values.registers[index], dynamic_position=[], static_position=[0]
                    )
                    llvm.store(value, _pointer(lse, place, single))

        def write_if_there(half: int, query: ir.Value, number: ir.Value) -> None:
            there = arith.cmpi(arith.CmpIPredicate.sge, query, _int(0))
            _when(there, lambda: write(half, query, number))

        for half, own in enumerate(_own_rows()):
            own = arith.addi(own, row)

            def write_row(half: int = half, own: ir.Value = own) -> None:
                query, number = _place(own, first, group)
                if slot:
                    query = llvm.load(i32, _pointer(slot[0], query, i32))
                write_if_there(half, query, number)

            _when(arith.cmpi(arith.CmpIPredicate.slt, own, rows), write_row)

    store(*refs, values, lse_values, first, head, row, rows)


def _own_heads(layout: fragmented_array.WGStridedFragLayout, column: ir.Value, dim: int) -> list:
    """The head that each of this thread's vectors lies in."""
    i32 = ir.IntegerType.get_signless(32)
    return [
        arith.divui(arith.addi(column, arith.index_cast(i32, index)), _int(dim))
        for index in layout.linear_thread_idxs()
    ]


def load_head_values(
    lse: Any, slot: Array, column: Array, *, heads: int, dim: int, size: int, width: int
) -> Array:
    """The lse of a partial result beside each of its values, float32[size].

    Args:
        lse: reference to float32[E, H].
        slot: which partial result.
        column: the first of the values, of H * D.
        heads: H.
        dim: D.
        size: how many values.
        width: values that a thread holds side by side, a divisor of `dim`.
    """
    layout = fragmented_array.WGStridedFragLayout((size,), width)
    result = plgpu.ShapeDtypeStruct(
        (size,), jnp.float32, layout=plgpu.Layout.WG_STRIDED((size,), vec_size=width)
    )

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR), return_type=result)
    def load(ctx: Any, lse: Any, *scalars: Any) -> Any:
        slot, column = scalars
        f32 = ir.F32Type.get()
        start = arith.muli(_scalar(slot), _int(heads))
        registers = np.empty(layout.registers_shape((size,)), dtype=object)
        for i, own in enumerate(_own_heads(layout, _scalar(column), dim)):
            value = llvm.load(f32, _pointer(lse, arith.addi(start, own), f32))
            registers[i] = vector.broadcast(ir.VectorType.get((width,), f32), value)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(lse, slot, column)


def store_head_values(
    lse: Any, values: Array, query: Array, column: Array, *, heads: int, dim: int, width: int
) -> None:
    """Writes each head's value, of which every one of its `dim` places holds a copy.

    Args:
        lse: reference to float32[T, H].
        values: float32[size], as `load_head_values` returns.
        query: whose.
        column: the first of the values, of H * D.
        heads: H.
        dim: D.
        width: as for `load_head_values`.
    """
    layout = plgpu.Layout.WG_STRIDED(values.shape, vec_size=width)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, _SCALAR, _SCALAR))
    def store(ctx: Any, lse: Any, *arguments: Any) -> None:
        values, query, column = arguments
        f32 = ir.F32Type.get()
        start = arith.muli(_scalar(query), _int(heads))
        for i, own in enumerate(_own_heads(values.layout, _scalar(column), dim)):
            value = vector.extract(values.registers[i], dynamic_position=[], static_position=[0])
            llvm.store(value, _pointer(lse, arith.addi(start, own), f32))

    store(lse, values, query, column)
