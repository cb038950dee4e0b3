"""Which leaves of a search tree say the same: clusters for ETS's program."""

from collections.abc import Hashable, Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

__all__ = ["average_linkage", "equal_keys"]

Array = np.ndarray


def equal_keys(keys: Sequence[Hashable]) -> Array:
    """int[N], equal where the keys are, such as the texts of the last steps, or true states."""
    number: dict[Hashable, int] = {}
    return np.asarray([number.setdefault(key, len(number)) for key in keys])


def average_linkage(vectors: Array, threshold: float) -> Array:
    """Agglomerative clusters by average linkage of cosine distances, cut at a distance.

    Args:
        vectors: float[N, E], such as mean hidden states of the last steps.
        threshold: clusters further apart than it stay apart; below 0 every leaf is its own. What
            is right depends on what makes the vectors: published is 0.05 for an encoder of texts.

    Returns:
        int[N], from 0 on. Equal vectors always share a cluster.
    """
    vectors = np.asarray(vectors, float)
    if threshold < 0 or len(vectors) < 2:
        return np.arange(len(vectors))
    norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    distance = pdist(vectors / norms, "cosine").clip(0)
    # Equal vectors are not exactly 0 apart in floats.
    _, kind = np.unique(vectors, axis=0, return_inverse=True)
    distance[pdist(kind.reshape(-1, 1).astype(float), "hamming") == 0] = 0.0
    return fcluster(linkage(distance, "average"), threshold, "distance") - 1
