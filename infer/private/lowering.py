"""Programs for the engine, lowered by the JAX of this environment.

The parties' environment needs no JAX: they get XLA's own serialized modules.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

__all__ = ["Program", "cached", "lower"]

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """A program over named arrays.

    Attributes:
        name: of it.
        hlo: XLA's serialized HloModuleProto.
        secret: of each input, in order: whether it is secret.
        outputs: shapes and dtypes.
        function: what was lowered, to be computed in the clear.
    """

    name: str
    hlo: bytes
    secret: tuple[bool, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    function: Callable[..., Any]


def lower(
    name: str, function: Callable[..., Any], inputs: Sequence[Any], public: Sequence[int] = ()
) -> Program:
    """Lowers a function of arrays, without compiling anything.

    Args:
        name: of the program.
        function: takes and returns flat arrays.
        inputs: arrays or shapes of its arguments.
        public: which arguments all parties know; the others are secret.

    Raises:
        ValueError: for a dtype that the engine has not.
    """
    shapes = [jax.ShapeDtypeStruct(np.shape(x), x.dtype) for x in inputs]
    for i, shape in enumerate(shapes):
        if shape.dtype not in (np.float32, np.int32, np.bool_):
            raise ValueError(f"input {i} of {name} is {shape.dtype}: use float32, int32 or bool")
    lowered = jax.jit(function, keep_unused=True).trace(*shapes).lower(lowering_platforms=("cpu",))
    module: Any = lowered.compiler_ir("hlo")
    secret = tuple(i not in public for i in range(len(shapes)))
    outputs = tuple(jax.tree.leaves(lowered.out_info))
    return Program(name, module.as_serialized_hlo_module_proto(), secret, outputs, function)


def cached(name: str, x: jax.ShapeDtypeStruct) -> Program:
    """A program that marks a value as multiplied with many times, to be masked and opened once.

    The Beaver protocols (SEMI2K) send both operands of a product in masked form; with this the mask
    of a value stays, and so does its masked form. The other protocols do nothing.
    """

    def mark(x: Array) -> Array:
        same = jax.ShapeDtypeStruct(x.shape, x.dtype)
        call: Callable[[Array], Array] = jax.ffi.ffi_call(
            "spu.make_cached_var", same, has_side_effect=True
        )
        return call(x)

    return dataclasses.replace(lower(name, mark, [x]), function=lambda x: x)
