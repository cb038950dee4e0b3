"""Which kind a prompt is of: its answer stands somewhere, or is gathered from everywhere.

WindowKV scores windows in another way for each. The paper's classifier is a BERT; this one is the
mean of learned embeddings of the prompt's first and last tokens, and a line between two classes.
Anything else that takes a prompt's tokens and says 0 or 1 may stand in its place.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.models.hf_files import bad_tensor, file_tensors
from kvjax.models.weights import load_weights

__all__ = ["AGGREGATION", "LOCALIZATION", "TaskClassifier", "ends", "load_classifier"]

Array = jax.Array

LOCALIZATION, AGGREGATION = 0, 1


def ends(tokens: np.ndarray, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last `size` tokens of a prompt, as the paper's classifier sees them.

    Returns:
        int32[2 * size], and which of them count, bool[2 * size]: a short prompt has fewer.
    """
    half = min(size, -(-len(tokens) // 2))
    own = np.concatenate([tokens[:half], tokens[max(half, len(tokens) - size) :]])
    filled, used = np.zeros(2 * size, np.int32), np.zeros(2 * size, bool)
    filled[: len(own)], used[: len(own)] = own, True
    return filled, used


class TaskClassifier(nnx.Module):
    """Mean-pooled embeddings to two logits."""

    def __init__(self, vocab_size: int, dim: int, *, rngs: nnx.Rngs) -> None:
        table = 0.1 * jax.random.normal(rngs.params(), (vocab_size, dim), jnp.float32)
        self.embed: nnx.Param[Array] = nnx.Param(table)
        self.kernel: nnx.Param[Array] = nnx.Param(jnp.zeros((dim, 2), jnp.float32))
        self.bias: nnx.Param[Array] = nnx.Param(jnp.zeros((2,), jnp.float32))

    def __call__(self, tokens: Array, used: Array) -> Array:
        """Logits of localization and aggregation, float32[B, 2].

        Args:
            tokens: int32[B, T], of `ends`.
            used: bool[B, T].
        """
        weight = used.astype(jnp.float32)[..., None]
        mean = jnp.sum(self.embed[...][tokens] * weight, axis=1)
        mean = mean / jnp.maximum(jnp.sum(weight, axis=1), 1.0)
        logits = jnp.tensordot(mean, self.kernel[...], 1, precision="highest")
        return logits + self.bias[...].reshape(1, -1)

    def classify(self, tokens: np.ndarray) -> int:
        """0 if a prompt's answer stands somewhere in it, 1 if it has to be gathered."""
        filled, used = ends(tokens)
        return int(jnp.argmax(self(jnp.asarray(filled[None]), jnp.asarray(used[None]))[0]))


def load_classifier(path: Path) -> TaskClassifier:
    """A classifier from its file.

    Raises:
        InputError: the file does not hold one.
    """
    tensors = file_tensors(path, "embed")
    if "embed" not in tensors or len(tensors["embed"].shape) != 2:
        raise bad_tensor(path, "embed", "cannot be used: this is no task classifier")
    vocab, dim = tensors["embed"].shape
    graph, shapes = nnx.split(nnx.eval_shape(lambda: TaskClassifier(vocab, dim, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, load_weights(path, shapes))
