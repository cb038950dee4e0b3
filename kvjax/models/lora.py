"""Low-rank adapters (Hu et al., 2021) of a decoder's products, as a function of its parameters.

An adapter is a tree of small arrays beside the decoder's own. `merge` adds their products to the
kernels, while training (inside of the step, so that gradients reach the adapter) and after it. The
model itself never knows: merged, it is as fast as it was.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.errors import InputError

__all__ = ["TARGETS", "LoRA"]

Array = jax.Array
Params = nnx.State[Any, Any]
TARGETS = ("q", "k", "v", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which products are adapted, and how.

    Attributes:
        rank: r, of every adapted product.
        alpha: the product of the two factors is scaled by alpha / r.
        targets: names of a block's products, from `TARGETS`.
    """

    rank: int = 4
    alpha: float = 4.0
    targets: tuple[str, ...] = ("q", "v")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"the rank of LoRA is {self.rank}: give 1 or more")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise InputError(
                f"the targets of LoRA are {self.targets}: use each at most once, from "
                f"{', '.join(TARGETS)}"
            )

    def init(self, params: Params, seed: int) -> dict[str, dict[str, Array]]:
        """A fresh adapter, which changes nothing yet: its second factors are zero.

        Args:
            params: of the decoder (arrays or shapes).
            seed: of the first factors, uniform within 1 / sqrt(inputs) as in the released models.

        Returns:
            For each target float32 `a` [L, inputs..., r] and `b` [L, r, outputs...].
        """
        rng = np.random.default_rng(seed)
        adapter = {}
        for target in self.targets:
            inputs, outputs = factor_shapes(params, target)
            bound = math.prod(inputs[1:]) ** -0.5
            a = rng.uniform(-bound, bound, (*inputs, self.rank))
            b = jnp.zeros((inputs[0], self.rank, *outputs), jnp.float32)
            adapter[target] = {"a": jnp.asarray(a, jnp.float32), "b": b}
        return adapter

    def merge(self, params: Params, adapter: dict[str, dict[str, Array]]) -> Params:
        """The decoder's parameters with the adapter in them; shapes and dtypes stay."""

        def add(path: tuple, x: Array) -> Array:
            names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
            if names[0] != "blocks" or names[-1] != "kernel" or names[1] not in adapter:
                return x
            return x + self._product(adapter[names[1]], x.shape).astype(x.dtype)

        return jax.tree_util.tree_map_with_path(add, params)

    def _product(self, factors: dict[str, Array], shape: tuple[int, ...]) -> Array:
        a, b = factors["a"], factors["b"]
        a, b = (a.reshape(shape[0], -1, self.rank), b.reshape(shape[0], self.rank, -1))
        precision = "highest" if a.dtype == jnp.float32 else None
        product = jnp.einsum("lir,lro->lio", a, b, precision=precision)
        return (self.alpha / self.rank) * product.reshape(shape)


def factor_shapes(params: Params, target: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes [L, inputs...] and [outputs...] of a target's kernel."""
    kernel: Any = params["blocks"][target]["kernel"]
    inputs = 3 if target == "out" else 2  # the layers' axis among them
    return kernel.shape[:inputs], kernel.shape[inputs:]
