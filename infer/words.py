"""A tree of small arrays as one array: one transfer to the device instead of one for each."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["from_words", "to_words"]


def to_words(tree: Any) -> np.ndarray:
    """The bits of all leaves, one after the other, int32[n].

    Args:
        tree: of numpy arrays: bool, or of four bytes a number.
    """
    return np.concatenate([_words(leaf) for leaf in jax.tree.leaves(tree)])


def _words(leaf: np.ndarray) -> np.ndarray:
    if leaf.dtype == np.bool_:
        leaf = leaf.astype(np.int32)
    return np.ascontiguousarray(leaf).reshape(-1).view(np.int32)


def from_words(like: Any, words: jax.Array) -> Any:
    """The tree again, inside of a jitted function.

    Args:
        like: a tree whose leaves have the shapes and dtypes, such as the one given to `to_words`.
        words: int32[n] of it.
    """
    leaves, structure = jax.tree.flatten(like)
    parts, start = [], 0
    for leaf in leaves:
        part = words[start : start + leaf.size].reshape(leaf.shape)
        start += leaf.size
        if leaf.dtype == np.bool_:
            parts.append(part != 0)
        else:
            parts.append(jax.lax.bitcast_convert_type(part, jnp.dtype(leaf.dtype)))
    return jax.tree.unflatten(structure, parts)
