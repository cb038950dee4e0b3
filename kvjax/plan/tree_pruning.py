"""Which leaves of a search tree live on: REBASE's allocation and ETS's program.

A level of a tree search has leaves, each with a reward, and a width: how many continuations are
drawn in all. REBASE (Wu et al. 2024) deals the width out by the softmax of the rewards. ETS (Hooper
et al. 2025) first chooses which leaves to keep, by a 0/1 program over leaves x, ancestors y and
clusters z:

    maximise  sum O x  -  lambda_b (cost of the kept nodes) / (cost of all)  +  lambda_d / K sum z

O is a leaf's share of the width, an ancestor is kept with any leaf under it, and a cluster of
leaves that say the same is covered by any of them. Then the whole width is dealt to what was kept.

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
        given = min(width, math.ceil(share - 1e-9 * max(1.0, share)))
        out[leaf] = given
        width -= given
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

    A kept node is worth all its children that are worth anything, or the one that loses least
    where none is, less its own cost; and one of the roots is always kept.
    """
    gain, worth, only = _subtrees(level, rewards, lambda_b)
    m = len(level.parent)
    nodes = np.zeros(m + 1, bool)
    nodes[-1] = True  # above the roots
    for node, parent in enumerate(level.parent):
        nodes[node] = nodes[parent] and (worth[node] > 0 or only[parent] == node)
    lone = only[level.leaf_parent] == m + np.arange(len(gain))
    leaves = nodes[level.leaf_parent] & ((gain > 0) | lone)
    value, kept = objective(level, rewards, leaves, lambda_b, 0.0)
    return Selection(leaves, kept, value, value)


def _subtrees(level: Level, rewards: Array, lambda_b: float) -> tuple[Array, Array, Array]:
    """What leaves and subtrees are worth if they are kept, and the children kept at a loss.

    Returns:
        float[N]; float[M]; int[M + 1]: a child that is kept although it is worth nothing, as its
        number, or M and a leaf's number, or -1. The last entry is of the roots.
    """
    scale, m = lambda_b / level.total_cost, len(level.parent)
    gain, worth = rewards - scale * level.leaf_cost, -scale * level.node_cost
    total, best, only = np.zeros(m + 1), np.full(m + 1, -np.inf), np.full(m + 1, -1)

    def add(parent: int, child: int, value: float) -> None:
        total[parent] += max(value, 0.0)
        if value > best[parent]:
            best[parent], only[parent] = value, child

    for leaf, parent in enumerate(level.leaf_parent):
        add(parent, m + leaf, gain[leaf])
    for node in range(m - 1, -1, -1):
        worth[node] += total[node] if best[node] > 0 else best[node]
        add(level.parent[node], node, worth[node])
    only[best > 0] = -1
    return gain, worth, only


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
    limit = {"time_limit": seconds} if seconds else {}
    solved = milp(
        -gain, constraints=rows, integrality=np.concatenate([np.ones(n), np.zeros(m + k)]),
        bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0} | limit,
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
    return LinearConstraint(matrix.tocsr(), lb=low)  # pyright: ignore[reportArgumentType]


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
