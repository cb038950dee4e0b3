"""Named axes: which dimension of which parameter is split over which axis of a device mesh.

One table for training and inference. A mesh has any of the axes `data` (copies of the model),
`fsdp` (parameters split, gathered where they are used) and `model` (heads, MLP and vocabulary
split). The library never creates a mesh: it takes the caller's, or works on the default device.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

__all__ = ["RULES", "param_axes", "param_shardings", "pool_spec", "spec"]

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "layer": (),
    "vocab": ("model",),
    "embed": ("fsdp",),
    "head": ("model",),
    "kv_head": ("model",),
    "head_dim": (),
    "mlp": ("model",),
}
"""Logical axis -> the mesh axes that split it, as far as the mesh has them."""

_PARAM_AXES: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embed",): ("vocab", "embed"),
    ("norm",): ("embed",),
    ("head", "kernel"): ("embed", "vocab"),
    ("blocks", "attn_norm"): ("layer", "embed"),
    ("blocks", "mlp_norm"): ("layer", "embed"),
    ("blocks", "q_norm"): ("layer", "head_dim"),
    ("blocks", "k_norm"): ("layer", "head_dim"),
    ("blocks", "q", "kernel"): ("layer", "embed", "head", "head_dim"),
    ("blocks", "k", "kernel"): ("layer", "embed", "kv_head", "head_dim"),
    ("blocks", "v", "kernel"): ("layer", "embed", "kv_head", "head_dim"),
    ("blocks", "q", "bias"): ("layer", "head", "head_dim"),
    ("blocks", "k", "bias"): ("layer", "kv_head", "head_dim"),
    ("blocks", "v", "bias"): ("layer", "kv_head", "head_dim"),
    ("blocks", "out", "kernel"): ("layer", "head", "head_dim", "embed"),
    ("blocks", "out", "bias"): ("layer", "embed"),
    ("blocks", "gate", "kernel"): ("layer", "embed", "mlp"),
    ("blocks", "gate", "bias"): ("layer", "mlp"),
    ("blocks", "up", "kernel"): ("layer", "embed", "mlp"),
    ("blocks", "up", "bias"): ("layer", "mlp"),
    ("blocks", "down", "kernel"): ("layer", "mlp", "embed"),
    ("blocks", "down", "bias"): ("layer", "embed"),
    # Of the blocks of a video model, one level deeper.
    ("qkv", "kernel"): ("layer", "embed", None, "head", "head_dim"),
    ("qkv", "bias"): ("layer", None, "head", "head_dim"),
    ("text", "q", "kernel"): ("layer", "embed", "head", "head_dim"),
    ("text", "kv", "kernel"): ("layer", "embed", None, "head", "head_dim"),
    ("spatial", "out", "kernel"): ("layer", "head", "head_dim", "embed"),
    ("prefix", "out", "kernel"): ("layer", "head", "head_dim", "embed"),
    ("temporal", "out", "kernel"): ("layer", "head", "head_dim", "embed"),
    ("text", "out", "kernel"): ("layer", "head", "head_dim", "embed"),
    ("modulation", "kernel"): ("embed", None, None),
    ("time_down", "kernel"): ("embed", None),
}


def spec(
    axes: Sequence[str | None], mesh: Mesh | AbstractMesh, shape: Sequence[int] | None = None
) -> PartitionSpec:
    """The placement of one array on a mesh.

    Args:
        axes: a name from `RULES` for every dimension; None keeps that dimension whole.
        mesh: a mesh with any of the axes data, fsdp and model.
        shape: the array's shape. A dimension that its mesh axes do not divide stays whole; without
            a shape every dimension is taken to be divisible.
    """
    entries: list[Any] = []
    for i, axis in enumerate(axes):
        names = tuple(name for name in RULES[axis] if name in mesh.shape) if axis else ()
        parts = math.prod(mesh.shape[name] for name in names)
        whole = not names or (shape is not None and shape[i] % parts != 0)
        entries.append(None if whole else names[0] if len(names) == 1 else names)
    return PartitionSpec(*entries)


def pool_spec(array: Any, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The placement of an array of a `KVPool`: keys and values by their heads, all else whole."""
    planes = (None, None, "kv_head", None, None)
    return spec(planes, mesh, array.shape) if array.ndim == 5 else PartitionSpec()


def param_axes(path: Sequence[Any]) -> tuple[str | None, ...]:
    """The logical axes of a model's parameter, by its place in the tree.

    The end of the path counts, so that a moment of an optimiser, which lies deeper in its own
    tree, is split as the parameter is.

    Args:
        path: a key path of `jax.tree_util`, or plain names like ("blocks", "q", "kernel").

    Returns:
        One name a dimension, or () for anything that is no decoder parameter (kept whole).
    """
    names = tuple(getattr(key, "key", key) for key in path if not hasattr(key, "name"))
    ends = (names[-n:] for n in (3, 2, 1))
    return next((_PARAM_AXES[end] for end in ends if end in _PARAM_AXES), ())


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A tree like `params` (arrays or shapes) with the `NamedSharding` of every leaf."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(param_axes(path), mesh, leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, params)
