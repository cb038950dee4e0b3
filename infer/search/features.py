"""Leaves that say the same by what the policy itself makes of them: no second model.

A leaf's vector is the mean hidden state over its last step's tokens. It is computed without the
cache, from the leaf's whole sequence, since the engine keeps keys and values and no hidden states.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.infer.llm import LLM
from kvjax.infer.search.tree import Node
from kvjax.models.attention import causal_attend
from kvjax.plan.tree_clusters import average_linkage

__all__ = ["HiddenClusters", "hidden_clusters"]

Array = jax.Array
_LENGTH = 32  # sequences are padded to a multiple of it, and their number to a power of two


@dataclasses.dataclass(frozen=True)
class HiddenClusters:
    """Clusters by average linkage of mean hidden states.

    Attributes:
        embed: `(tokens [B, T], first [B], end [B]) -> float32[B, E]`.
        threshold: the cosine distance at which clusters stay apart. It depends on the model:
            compare with what is known to be equal before it is relied on.
    """

    embed: Callable[[np.ndarray, np.ndarray, np.ndarray], Array]
    threshold: float

    def vectors(self, leaves: Sequence[Node]) -> np.ndarray:
        """float32[N, E]."""
        sequences = [leaf.sequence() for leaf in leaves]
        rows = 1 << (len(leaves) - 1).bit_length()
        longest = -(-max(map(len, sequences)) // _LENGTH) * _LENGTH
        tokens = np.zeros((rows, longest), np.int32)
        first, end = np.zeros(rows, np.int32), np.ones(rows, np.int32)
        for row, (leaf, sequence) in enumerate(zip(leaves, sequences, strict=True)):
            tokens[row, : len(sequence)] = sequence
            end[row] = len(sequence)
            first[row] = min(len(sequence) - len(leaf.tokens), len(sequence) - 1)
        return np.asarray(self.embed(tokens, first, end))[: len(leaves)]

    def __call__(self, leaves: Sequence[Node]) -> np.ndarray:
        """int[N]."""
        return average_linkage(self.vectors(leaves), self.threshold)


def hidden_clusters(llm: LLM, threshold: float) -> HiddenClusters:
    """Clusters by the hidden states of a model."""
    engine = llm.engine

    @jax.jit
    def embed(params: Any, tokens: Array, first: Array, end: Array) -> Array:
        decoder = nnx.merge(engine.graph, params[0])
        place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        attend = causal_attend(engine.model.layer_windows())
        positions = jnp.broadcast_to(place, tokens.shape)
        hidden, _ = decoder(tokens, positions, (), attend, layers=params[1])
        own = (place >= first[:, None]) & (place < end[:, None])
        weights = own.astype(jnp.float32) / (end - first)[:, None].astype(jnp.float32)
        return jnp.einsum("bt,bte->be", weights, hidden.astype(jnp.float32))

    return HiddenClusters(functools.partial(embed, engine.params), threshold)
