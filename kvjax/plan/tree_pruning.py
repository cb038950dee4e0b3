"""Which leaves of a search tree live on: REBASE's allocation and ETS's program.

A level of a tree search has leaves, each with a reward, and a width: how many continuations are
drawn in all. REBASE (Wu et al. 2024) deals the width out by the softmax of the rewards. ETS (Hooper
et al. 2025) first chooses which leaves to keep, by a 0/1 program over leaves x, ancestors y and
clusters z:

    maximise   sum O x  -  lambda_b * (cost of the kept nodes) / (cost of all)  +  lambda_d / K * sum z

O is a leaf's share of the width, an ancestor is kept with any leaf under it, and a cluster of leaves
that say the same is covered by any of them. Then the whole width is dealt to what was kept.

Letters: N leaves, M ancestors, K clusters. A tree is its parents: `parent[j]` of each ancestor, -1
for the root, parents before children; and `leaf_parent[i]` of each leaf.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from kvjax.errors import InputError

__all__ = [
    "Level", "Selection", "ets_select", "keep_all", "objective", "program_dynamic", "program_exact",
    "rebase_allocation", "round_allocation", "shares",
]  # fmt: skip

Array = np.ndarray
# Of a node that costs nothing keeping it is worth so much: where lambda_b is 0 all are kept, as the
# released program does.
_KEEP = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """The leaves of one level and what is above them.

    Attributes:
        parent: int[M], of each ancestor; -1 for roots. A parent stands before its children.
        leaf_parent: int[N], of each leaf.
        node_cost: float[M], what keeping each ancestor costs, such as its pages.
        leaf_cost: float[N], likewise of the leaves.
        cluster: int[N], 0 to K - 1, which leaves say the same; None: coverage is not asked for.
    """

    parent: Array
    leaf_parent: Array
    node_cost: Array
    leaf_cost: Array
    cluster: Array | None = None

    @staticmethod
    def uniform(
        parent: Sequence[int], leaf_parent: Sequence[int], cluster: Sequence[int] | None = None
    ) -> "Level":
        """Every node costs the same, as in the released code."""
        return Level(
            parent=np.asarray(parent, int),
            leaf_parent=np.asarray(leaf_parent, int),
            node_cost=np.ones(len(parent)),
            leaf_cost=np.ones(len(leaf_parent)),
            cluster=None if cluster is None else np.asarray(cluster, int),
        )

    @property
    def total_cost(self) -> float:
        """Of keeping everything."""
        return float(self.node_cost.sum() + self.leaf_cost.sum())


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a program keeps.

    Attributes:
        leaves: bool[N].
        nodes: bool[M], the ancestors of kept leaves.
        value: of the objective.
        bound: no selection is worth more; equal to the value where it was proved best.
    """

    leaves: Array
    nodes: Array
    value: float
    bound: float


def rebase_allocation(scores: Array, width: int, temperature: float) -> Array:
    """REBASE's allocation as released: the best leaves first, each its share of what is left.

    Args:
        scores: float[N]; -inf gets nothing.
        width: continuations in all.
        temperature: of the softmax, above 0.

    Returns:
        int[N] whose sum is the width wherever a score is finite. Equal scores are served in order.
    """
    weights = _weights(scores, temperature)
    out = np.zeros(len(weights), int)
    # The sum of what is left is formed anew for each leaf: a running difference loses its digits.
    order = np.argsort(-weights, kind="stable")
    rest = np.cumsum(weights[order][::-1])[::-1]
    for leaf, total in zip(order, rest, strict=True):
        if not width or not total:
            break
        share = width * (weights[leaf] / total)
        # Shares of equal leaves differ in the last digit; it must not become a continuation.
        out[leaf] = min(width, math.ceil(share - 1e-9 * max(1.0, share)))
        width -= out[leaf]
    return out


def round_allocation(scores: Array, width: int, temperature: float) -> Array:
    """REBASE's allocation as the paper writes it: every share rounded, so the sum may differ."""
    weights = _weights(scores, temperature)
    return np.rint(width * weights / weights.sum()).astype(int)


def _weights(scores: Array, temperature: float) -> Array:
    scores = np.asarray(scores, float)
    if temperature <= 0:
        raise InputError(f"the temperature of an allocation is {temperature}: give more than 0")
    top = scores.max(initial=-np.inf)
    return np.exp((scores - top) / temperature) if np.isfinite(top) else np.zeros(len(scores))


def shares(allocation: Array) -> Array:
    """O: each leaf's part of the width, float[N]."""
    return allocation / allocation.sum()


def objective(
    level: Level, rewards: Array, leaves: Array, lambda_b: float, lambda_d: float
) -> tuple[float, Array]:
    """What keeping `leaves` (bool[N]) is worth, and bool[M] the ancestors that it keeps."""
    nodes = _above(level, leaves)
    cost = level.node_cost[nodes].sum() + level.leaf_cost[leaves].sum()
    value = rewards[leaves].sum() - lambda_b * cost / level.total_cost
    if level.cluster is not None and lambda_d:
        covered = len(np.unique(level.cluster[leaves]))
        value += lambda_d * covered / len(np.unique(level.cluster))
    return float(value), nodes


def _above(level: Level, leaves: Array) -> Array:
    nodes = np.zeros(len(level.parent), bool)
    nodes[level.leaf_parent[leaves]] = True
    for node in range(len(nodes) - 1, 0, -1):  # parents stand before children
        if nodes[node] and level.parent[node] >= 0:
            nodes[level.parent[node]] = True
    return nodes


def program_dynamic(level: Level, rewards: Array, lambda_b: float) -> Selection:
    """The best selection without coverage, exactly, in time linear in the nodes.

    Keeping leaves with their ancestors is a closure: a subtree is worth the sum of its children
    that are worth anything, less its own cost.
    """
    return _closure(level, rewards, lambda_b, 0.0)


def _closure(level: Level, rewards: Array, lambda_b: float, keep: float) -> Selection:
    gain, worth = _subtrees(level, rewards, lambda_b, keep)
    nodes = _reached(level, worth)
    leaves = (gain > 0) & nodes[level.leaf_parent]
    if not leaves.any():
        leaves = _best_single(level, rewards, lambda_b)
    value, nodes = objective(level, rewards, leaves, lambda_b, 0.0)
    return Selection(leaves, nodes, value, value)


def _subtrees(
    level: Level, rewards: Array, lambda_b: float, keep: float = 0.0
) -> tuple[Array, Array]:
    """What each leaf and each ancestor's subtree is worth by itself."""
    scale = lambda_b / level.total_cost
    gain = rewards - scale * level.leaf_cost + keep
    worth = keep - scale * level.node_cost
    np.add.at(worth, level.leaf_parent, np.maximum(gain, 0.0))
    for node in range(len(worth) - 1, -1, -1):
        if level.parent[node] >= 0 and worth[node] > 0:
            worth[level.parent[node]] += worth[node]
    return gain, worth


def _reached(level: Level, worth: Array) -> Array:
    """Which ancestors are kept: those worth something all the way up."""
    nodes = worth > 0
    for node, parent in enumerate(level.parent):
        if parent >= 0:
            nodes[node] &= nodes[parent]
    return nodes


def _best_single(level: Level, rewards: Array, lambda_b: float) -> Array:
    """The one leaf that loses least, for a program that may not keep nothing."""
    path = np.zeros(len(level.parent))
    for node, parent in enumerate(level.parent):
        path[node] = level.node_cost[node] + (path[parent] if parent >= 0 else 0.0)
    alone = rewards - lambda_b * (level.leaf_cost + path[level.leaf_parent]) / level.total_cost
    return np.arange(len(rewards)) == int(np.argmax(alone))


def program_exact(
    level: Level, rewards: Array, lambda_b: float, lambda_d: float, *, seconds: float | None = None
) -> Selection:
    """The best selection by HiGHS (`scipy.optimize.milp`).

    The rows y_ancestor >= x_leaf of the paper are replaced by those of the tree's edges, which say
    the same with N + M rows instead of N times the depth.

    Args:
        level: the leaves.
        rewards: float[N], O.
        lambda_b: what the whole tree costs.
        lambda_d: what all clusters are worth.
        seconds: after which the best found so far is taken, with its bound; None: never.
    """
    m, n = len(level.parent), len(rewards)
    cluster = level.cluster if level.cluster is not None and lambda_d else np.zeros(n, int)
    names, cluster = np.unique(cluster, return_inverse=True)
    k = len(names) if level.cluster is not None and lambda_d else 0
    scale = lambda_b / level.total_cost
    gain = np.concatenate(
        [
            rewards - scale * level.leaf_cost,
            -scale * level.node_cost,
            np.full(k, lambda_d / max(k, 1)),
        ]
    )
    rows = _rows(level, cluster, n, m, k)
    # Only the leaves are whole by themselves: an ancestor or cluster then is where it pays.
    solved = milp(
        -gain, constraints=rows, integrality=np.concatenate([np.ones(n), np.zeros(m + k)]),
        bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0} | ({"time_limit": seconds} if seconds else {}),
    )  # fmt: skip
    if solved.x is None:
        raise InputError(f"the selection program has no solution ({solved.message})")
    leaves = solved.x[:n] > 0.5
    value, nodes = objective(level, rewards, leaves, lambda_b, lambda_d)
    bound = value if solved.status == 0 else -float(solved.mip_dual_bound)
    return Selection(leaves, nodes, value, max(value, bound))


def _rows(level: Level, cluster: Array, n: int, m: int, k: int) -> LinearConstraint:
    """Rows a . (x, y, z) >= low: edges of the tree, clusters, and one leaf at least."""
    leaf, inner = np.arange(n), np.flatnonzero(level.parent >= 0)
    edges, tail = n + len(inner), n + len(inner) + k
    row = [leaf, leaf, n + np.arange(len(inner)), n + np.arange(len(inner))]
    column = [n + level.leaf_parent, leaf, n + level.parent[inner], n + inner]
    value = [np.ones(n), -np.ones(n), np.ones(len(inner)), -np.ones(len(inner))]
    if k:  # x of its leaves, less z
        row += [edges + cluster, edges + np.arange(k)]
        column += [leaf, n + m + np.arange(k)]
        value += [np.ones(n), -np.ones(k)]
    row.append(np.full(n, tail))
    column.append(leaf)
    value.append(np.ones(n))
    matrix = coo_array(
        (np.concatenate(value), (np.concatenate(row), np.concatenate(column))),
        shape=(tail + 1, n + m + k),
    )
    low = np.zeros(tail + 1)
    low[-1] = 1
    return LinearConstraint(matrix.tocsr(), lb=low)


def keep_all(level: Level, rewards: Array) -> Selection:
    """Everything: REBASE."""
    leaves, nodes = np.ones(len(level.leaf_parent), bool), np.ones(len(level.parent), bool)
    value = float(rewards.sum())
    return Selection(leaves, nodes, value, value)


def ets_select(
    level: Level, rewards: Array, lambda_b: float, lambda_d: float, *, seconds: float | None = None
) -> Selection:
    """ETS's choice: everything where nothing costs, else the best, by whichever way is exact."""
    if lambda_b <= 0:
        everything = keep_all(level, rewards)
        value, nodes = objective(level, rewards, everything.leaves, lambda_b, lambda_d)
        return Selection(everything.leaves, nodes, value, value)
    if lambda_d <= 0 or level.cluster is None or len(np.unique(level.cluster)) < 2:
        return _with_coverage(level, rewards, lambda_b, lambda_d)
    return program_exact(level, rewards, lambda_b, lambda_d, seconds=seconds)


def _with_coverage(level: Level, rewards: Array, lambda_b: float, lambda_d: float) -> Selection:
    """Where one cluster holds all, any selection covers it."""
    found = program_dynamic(level, rewards, lambda_b)
    value, nodes = objective(level, rewards, found.leaves, lambda_b, lambda_d)
    return Selection(found.leaves, nodes, value, value)
