"""Weights of our own models as safetensors files: every parameter under its path in the module."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from kvjax.errors import InputError
from kvjax.models.hf_files import bad_tensor, file_tensors

__all__ = ["load_weights", "parameter_names", "save_weights"]

State = nnx.State[Any, Any]


def parameter_names(params: Any) -> list[str]:
    """The dotted path of each leaf, such as "blocks.q.kernel"."""
    return [_dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _dotted(path: tuple[Any, ...]) -> str:
    # The value inside of an `nnx.Param` has a key too, which is not part of the name.
    return ".".join(str(getattr(key, "key", key)) for key in path if not hasattr(key, "name"))


def save_weights(path: Path, params: Any, *, dtype: str = "float32") -> None:
    """Writes a module's parameters.

    Args:
        path: of the file; its folder is made. It is there whole or not at all.
        params: of `nnx.split`; gathered on the host.
        dtype: "bfloat16" or "float32".
    """
    leaves = [np.asarray(leaf).astype(jnp.dtype(dtype)) for leaf in jax.tree.leaves(params)]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    save_file(dict(zip(parameter_names(params), leaves, strict=True)), part)
    part.chmod(0o644)  # safetensors makes it readable for its owner only
    part.replace(path)


def load_weights(path: Path, like: Any) -> Any:
    """A module's parameters from a file.

    Args:
        path: of the file.
        like: the parameters or their shapes; what is read is given these dtypes.

    Raises:
        InputError: a parameter is not in the file, or of another shape.
    """
    names = parameter_names(like)
    tensors = file_tensors(path, names[0])
    if unknown := sorted(tensors.keys() - set(names)):
        raise InputError(f"{path}: holds {unknown[0]!r}, which the model has not; wrong file?")

    def read(name: str, leaf: Any) -> jax.Array:
        if name not in tensors or tensors[name].shape != leaf.shape:
            found = tensors[name].shape if name in tensors else "missing"
            problem = f"is {found}, not {leaf.shape}"
            raise bad_tensor(path, name, problem, "give the file of this model")
        block = tensors[name].read(tuple(slice(None) for _ in leaf.shape))
        return jnp.asarray(block.astype(leaf.dtype))

    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, map(read, names, leaves))
