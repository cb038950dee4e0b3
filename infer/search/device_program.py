"""ETS's program on the device: nearly the best selection, with a bound on what is missed.

The exact program is the host's (`kvjax.plan.tree_pruning.program_exact`). Where a level's decoding
would wait for it, this is the other way: the rows z <= sum x are priced out, one price a cluster,
what is left is a closure that one pass up and one down the tree solve, and the prices follow the
subgradient. Every iteration gives a selection and a bound; the best of each are kept, and single
leaves are then added or taken out while that helps.

Letters: N leaves, M ancestors, K clusters; all padded to the sizes that a program is made for.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.plan.tree_pruning import Level, Selection, objective

__all__ = ["DeviceProgram", "make_device_program"]

Array = jax.Array


class _Tree(NamedTuple):
    """A level, padded: parent and leaf_parent are M where there is nothing above."""

    parent: Any  # int32[M]
    depth: Any  # int32[M], -1 pads
    leaf_parent: Any  # int32[N]
    node_cost: Any  # float32[M]
    leaf_cost: Any  # float32[N]
    cluster: Any  # int32[N], K pads
    live: Any  # bool[N]


@dataclasses.dataclass(frozen=True)
class DeviceProgram:
    """Solves levels of up to so many leaves, ancestors, clusters and generations."""

    solve: Callable[..., tuple[Array, Array]]
    leaves: int
    nodes: int
    depth: int

    def __call__(
        self, level: Level, rewards: np.ndarray, lambda_b: float, lambda_d: float
    ) -> Selection:
        """A selection, its value, and a bound that no selection exceeds by more than float32."""
        if level.cluster is None:
            level = dataclasses.replace(level, cluster=np.zeros(len(rewards), int))
            lambda_d = 0.0
        tree, clusters = self._pad(level)
        padded = np.zeros(self.leaves, np.float32)
        padded[: len(rewards)] = rewards
        kept, bound = self.solve(
            tree, padded, np.float32(lambda_b / level.total_cost), np.float32(lambda_d / clusters)
        )
        leaves = np.asarray(kept)[: len(rewards)]
        value, nodes = objective(level, rewards, leaves, lambda_b, lambda_d)
        return Selection(leaves, nodes, value, max(value, float(bound) + 1e-6))

    def _pad(self, level: Level) -> tuple[_Tree, int]:
        m, n = len(level.parent), len(level.leaf_parent)
        depth = np.zeros(m, int)
        for node, parent in enumerate(level.parent):
            depth[node] = depth[parent] + 1 if parent >= 0 else 0
        if m > self.nodes or n > self.leaves or depth.max() >= self.depth:
            raise ValueError(
                f"{n} leaves, {m} nodes and {depth.max() + 1} generations are more than the "
                f"program's {self.leaves}, {self.nodes} and {self.depth}"
            )
        assert level.cluster is not None
        names, cluster = np.unique(level.cluster, return_inverse=True)

        def fill(values: np.ndarray, size: int, rest: Any, dtype: Any) -> np.ndarray:
            out = np.full(size, rest, dtype)
            out[: len(values)] = values
            return out

        above = np.where(level.parent < 0, self.nodes, level.parent)
        tree = _Tree(
            fill(above, self.nodes, self.nodes, np.int32),
            fill(depth, self.nodes, -1, np.int32),
            fill(level.leaf_parent, self.leaves, self.nodes, np.int32),
            fill(level.node_cost, self.nodes, 0, np.float32),
            fill(level.leaf_cost, self.leaves, 0, np.float32),
            fill(cluster, self.leaves, self.leaves, np.int32),
            fill(np.ones(n, bool), self.leaves, False, bool),
        )
        return tree, len(names)


def make_device_program(
    leaves: int, nodes: int, depth: int, *, iterations: int = 200, flips: int = 32
) -> DeviceProgram:
    """A jitted program for levels of up to these sizes.

    Args:
        leaves: the most of them.
        nodes: likewise, of ancestors.
        depth: likewise, of their generations.
        iterations: of the prices.
        flips: single leaves that are added or taken out at the end, at most.
    """
    solve = functools.partial(_solve, nodes, depth, iterations, flips)
    return DeviceProgram(jax.jit(solve), leaves, nodes, depth)


def _solve(
    m: int, depth: int, iterations: int, flips: int, tree: _Tree, rewards: Array, scale: Array,
    worth: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Kept leaves bool[N], and the bound. `worth` is what each cluster is worth."""
    n = rewards.shape[0]
    tree = _Tree(*(jnp.asarray(x) for x in tree))
    there = jax.ops.segment_max(tree.live.astype(jnp.int32), tree.cluster, n + 1)[:n] > 0
    above = _incidence(m, depth, tree)

    def one(i: Array, carry: tuple) -> tuple:
        prices, best, value, bound = carry
        gain = rewards + jnp.append(prices, 0.0)[tree.cluster] - scale * tree.leaf_cost
        gain = jnp.where(tree.live, gain, -jnp.inf)
        kept, top = _closure(m, depth, tree, gain, scale)
        bound = jnp.minimum(bound, top + jnp.sum(jnp.where(there, worth - prices, 0.0)))
        own = _value(tree, above, kept, rewards, scale, worth)
        best = jnp.where(own > value, kept, best)
        count = jax.ops.segment_sum(kept.astype(jnp.float32), tree.cluster, n + 1)[:n]
        step = worth / (2.0 + 0.25 * i.astype(jnp.float32))
        prices = jnp.clip(prices - step * jnp.clip(count - 1.0, -1.0, 1.0), 0.0, worth)
        return prices, best, jnp.maximum(own, value), bound

    prices = jnp.where(there, 0.5 * worth, 0.0)
    start = (prices, jnp.zeros(n, bool), jnp.float32(-jnp.inf), jnp.float32(jnp.inf))
    _, best, _, bound = jax.lax.fori_loop(0, iterations, one, start)
    flip = functools.partial(_flip, tree, above, rewards, scale, worth)
    return jax.lax.fori_loop(0, flips, lambda _, kept: flip(kept), best), bound


def _closure(m: int, depth: int, tree: _Tree, gain: Array, scale: Array) -> tuple[Array, Array]:
    """The best leaves at these gains, at least one, and their value: `program_dynamic`."""
    total = jax.ops.segment_sum(jnp.maximum(gain, 0.0), tree.leaf_parent, m + 1)
    best = jax.ops.segment_max(gain, tree.leaf_parent, m + 1)

    def up(i: Array, carry: tuple) -> tuple:
        total, best, worth = carry
        own = jnp.where(best > 0, total, best)[:m] - scale * tree.node_cost
        at = tree.depth == depth - 1 - i
        total = total.at[tree.parent].add(jnp.where(at, jnp.maximum(own, 0.0), 0.0))
        best = best.at[tree.parent].max(jnp.where(at, own, -jnp.inf))
        return total, best, jnp.where(at, own, worth)

    worth = jnp.full(m, -jnp.inf)
    total, best, worth = jax.lax.fori_loop(0, depth, up, (total, best, worth))
    # Whom a node keeps for want of better: the first of the best.
    number = jnp.arange(m + gain.shape[0], dtype=jnp.int32)
    parent = jnp.concatenate([tree.parent, tree.leaf_parent])
    value = jnp.concatenate([worth, gain])
    lone = (value == best[parent]) & (best[parent] <= 0)
    only = jax.ops.segment_min(jnp.where(lone, number, m + len(gain)), parent, m + 1)
    chosen = (value > 0) | (only[parent] == number)

    def down(i: Array, kept: Array) -> Array:
        at = tree.depth == i
        return kept.at[:m].set(jnp.where(at, kept[tree.parent] & chosen[:m], kept[:m]))

    kept = jnp.zeros(m + 1, bool).at[m].set(True)
    kept = jax.lax.fori_loop(0, depth, down, kept)
    top = jnp.where(best[m] > 0, total[m], best[m])
    return kept[tree.leaf_parent] & chosen[m:] & tree.live, top


def _incidence(m: int, depth: int, tree: _Tree) -> Array:
    """Which ancestors are above which leaves: float32[M, N]."""
    node = jnp.arange(m, dtype=jnp.int32)
    parents = jnp.append(tree.parent, m)

    def up(_: Array, carry: tuple) -> tuple:
        above, at = carry
        return above | (at[None] == node[:, None]), parents[at]

    start = (jnp.zeros((m, tree.leaf_parent.shape[0]), bool), tree.leaf_parent)
    return jax.lax.fori_loop(0, depth, up, start)[0].astype(jnp.float32)


def _value(
    tree: _Tree, above: Array, kept: Array, rewards: Array, scale: Array, worth: Array
) -> Array:
    n, own = rewards.shape[0], kept.astype(jnp.float32)
    nodes = jnp.sum(jnp.where(above @ own > 0, tree.node_cost, 0.0))
    covered = jnp.sum(jax.ops.segment_max(own, tree.cluster, n + 1)[:n] > 0)
    cost = scale * (nodes + jnp.sum(tree.leaf_cost * own))
    value = jnp.sum(rewards * own) - cost + worth * covered.astype(jnp.float32)
    return jnp.where(jnp.any(kept), value, -jnp.inf)


def _flip(
    tree: _Tree, above: Array, rewards: Array, scale: Array, worth: Array, kept: Array
) -> Array:
    """The best change of one leaf, if any is for the better."""
    n, own = rewards.shape[0], kept.astype(jnp.float32)
    under = above @ own
    count = jax.ops.segment_sum(own, tree.cluster, n + 1)[tree.cluster]
    opened = jnp.where(under == 0, tree.node_cost, 0.0) @ above
    closed = jnp.where(under == 1, tree.node_cost, 0.0) @ above
    alone = rewards - scale * tree.leaf_cost
    add = alone - scale * opened + jnp.where(count == 0, worth, 0.0)
    drop = -alone + scale * closed - jnp.where(count == 1, worth, 0.0)
    drop = jnp.where(jnp.sum(own) > 1, drop, -jnp.inf)
    change = jnp.where(tree.live, jnp.where(kept, drop, add), -jnp.inf)
    best = jnp.argmax(change)
    return jnp.where(change[best] > 1e-7, kept.at[best].set(~kept[best]), kept)
