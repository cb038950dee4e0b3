"""Which prompts of a batch share which beginning, decided before anything runs.

The prompts, sorted, stand beside those that share the most with them: the lengths of neighbours'
common beginnings say all about the compressed trie. A plan chooses some of its nodes; each prompt
goes on from the deepest chosen node above it, whose tokens are computed once.

Of one level (`exact`, BatchLLM section 4, arXiv 2412.03594), a prompt's shared beginning is one
node, computed from its first token on: the best choice is found by a dynamic program over pairs of
a node and its nearest chosen ancestor. With all levels (`multi`) a node goes on from the one above
it, which saves whatever can be saved.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

__all__ = ["Method", "PrefixGroup", "PrefixPlan", "PrefixTree", "plan_prefixes"]

Array = np.ndarray
Method = Literal["exact", "multi", "lifting", "naive"]
Tokens = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class PrefixTree:
    """The compressed trie of some prompts: its nodes are beginnings that two or more share.

    Nodes are in preorder, the root, of depth 0, first. n nodes, B prompts.

    Attributes:
        parent: int[n], -1 for the root.
        depth: int[n] tokens, whole pages of them.
        first, end: int[n]: the prompts below a node are `order[first:end]`.
        order: int[B], the prompts sorted by their tokens.
        node: int[B], the deepest node of each prompt.
    """

    parent: Array
    depth: Array
    first: Array
    end: Array
    order: Array
    node: Array

    @staticmethod
    def of(prompts: Sequence[Tokens], page_size: int = 1) -> "PrefixTree":
        """The trie of prompts' tokens, none below 0; only whole pages are shared."""
        order, common = _sort(prompts)
        return PrefixTree.of_neighbours(order, common // page_size * page_size)

    @staticmethod
    def of_neighbours(order: Array, common: Array) -> "PrefixTree":
        """The trie of sorted sequences, from what each shares with the one before.

        Args:
            order: int[B].
            common: int[B + 1], 0 at both ends.
        """
        parent, depth, first, end, nearest = _build(common.tolist())
        # Of the nodes that a prompt shares with the one before and the one after, the deeper.
        before, after = nearest[:-1], nearest[1:]
        own = np.where(depth[before] > depth[after], before, after)
        preorder = np.lexsort((depth, first))
        rank = np.empty_like(preorder)
        rank[preorder] = np.arange(len(preorder))
        node = np.empty_like(own)
        node[order] = rank[own]
        above = np.where(parent < 0, -1, rank[parent])[preorder]
        return PrefixTree(above, depth[preorder], first[preorder], end[preorder], order, node)

    @property
    def leaves(self) -> Array:
        """int[n], the prompts below each node."""
        return self.end - self.first


@dataclasses.dataclass(frozen=True)
class PrefixGroup:
    """Prompts that go on from the same tokens.

    Attributes:
        length: of the shared beginning in tokens, whole pages of them.
        parent: the group whose tokens it goes on from; -1: it starts from nothing. Before it.
        members: indices of the prompts that go on from here, in the order of their tokens.
    """

    length: int
    parent: int
    members: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PrefixPlan:
    """Every prompt in one group or alone.

    Attributes:
        groups: each after its parent.
        alone: prompts that share nothing.
        saved: prompt tokens that need not be computed.
    """

    groups: tuple[PrefixGroup, ...]
    alone: tuple[int, ...]
    saved: int


def plan_prefixes(
    prompts: Sequence[Tokens], page_size: int = 1, method: Method = "multi"
) -> PrefixPlan:
    """Plans what a batch shares.

    Args:
        prompts: token ids; leave out of each what is to be computed in any case, such as its last
            token, whose successor is to be drawn.
        page_size: tokens; only whole pages are shared.
        method: "multi": every level, which saves the most. "exact": one level, the best there is.
            "lifting": one level by the rule of BatchLLM's released code, never better than
            "exact". "naive": one level, that of the trie's root.

    Raises:
        ValueError: no such method.
    """
    if method not in get_args(Method):
        raise ValueError(f"{method=}: use one of {', '.join(get_args(Method))}")
    tree = PrefixTree.of(prompts, page_size)
    if method == "multi":
        return _plan(tree, tree.node, nested=True)
    choose = {"exact": _exact, "lifting": _lifting, "naive": _naive}[method]
    return _plan(tree, choose(tree), nested=False)


def _sort(prompts: Sequence[Tokens]) -> tuple[Array, Array]:
    """The prompts' order, and what neighbours have in common: int[B + 1], 0 at both ends."""
    # Bytes of the highest first compare as the tokens do, many at a time.
    keys = [np.asarray(prompt, ">u4").tobytes() for prompt in prompts]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = np.zeros(len(keys) + 1, np.int64)
    for i in range(1, len(order)):
        common[i] = _common(keys[order[i - 1]], keys[order[i]])
    return np.array(order, np.int64), common


def _common(a: bytes, b: bytes) -> int:
    """How many tokens two prompts have in common."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // 4
    left, right = np.frombuffer(a[:size], np.uint32), np.frombuffer(b[:size], np.uint32)
    return int(np.argmax(left != right))


def _build(common: list[int]) -> tuple[Array, Array, Array, Array, Array]:
    """Nodes from what neighbours have in common: parent, depth, first, end; and for each border
    between two prompts the node of what they share.
    """
    parent, depth, first, end, nearest = [-1], [0], [0], [0], [0]
    path = [0]
    for i, shared in enumerate(common[1:], 1):
        start = i - 1
        while depth[path[-1]] > shared:
            node = path.pop()
            end[node], start = i, first[node]
            # Between the two lies the node that is made below.
            parent[node] = path[-1] if depth[path[-1]] >= shared else len(depth)
        if depth[path[-1]] < shared:
            for column, value in ((parent, path[-1]), (depth, shared), (first, start), (end, 0)):
                column.append(value)
            path.append(len(depth) - 1)
        nearest.append(path[-1])
    end[0] = len(common) - 1
    return tuple(np.array(column, np.int64) for column in (parent, depth, first, end, nearest))  # pyright: ignore[reportReturnType]


def _own(tree: PrefixTree) -> list[int]:
    """How many prompts have each node as their deepest."""
    return np.bincount(tree.node, minlength=len(tree.depth)).tolist()


def _levels(tree: PrefixTree) -> list[int]:
    """How many ancestors each node has."""
    level: list[int] = []
    for above in tree.parent.tolist():
        level.append(level[above] + 1 if above >= 0 else 0)
    return level


def _exact(tree: PrefixTree) -> Array:
    """The node that each prompt goes on from in the best plan of one level; the root: none.

    F(v, a), the tokens saved below node v if its nearest chosen ancestor has depth a, is the larger
    of not choosing v, own(v) * a + sum F(c, a), and choosing it, own(v) * D(v) + sum F(c, D(v))
    - D(v). The first grows with a, the second does not depend on it: v is chosen below some a.
    """
    own, depth, level = _own(tree), tree.depth.tolist(), _levels(tree)
    ancestors = np.zeros(max(level) + 1, np.int64)  # depths of those of the current node
    path: list[int] = []
    # For each node of the path, the sum of its children's F, by which node of the path is their
    # nearest chosen one: itself last.
    sums: list[Array] = []
    chosen_under = [0] * len(depth)  # of how many of its ancestors, from the root on

    def finish() -> None:
        v, below, n = path.pop(), sums.pop(), len(path)
        without = own[v] * ancestors[:n] + below[:n]
        chosen = own[v] * depth[v] + int(below[n]) - depth[v]
        chosen_under[v] = int(np.searchsorted(without, chosen))
        sums[-1] += np.maximum(without, chosen)

    for v in range(len(depth)):
        while len(path) > level[v]:
            finish()
        ancestors[level[v]] = depth[v]
        path.append(v)
        sums.append(np.zeros(len(path), np.int64))
    while len(path) > 1:
        finish()
    return _follow(tree, level, chosen_under)


def _follow(tree: PrefixTree, level: list[int], chosen_under: list[int]) -> Array:
    """From the root down: each node's nearest chosen node, itself included."""
    nearest: list[int] = []
    for v, above in enumerate(tree.parent.tolist()):
        outer = nearest[above] if above >= 0 else 0
        nearest.append(v if v and level[outer] < chosen_under[v] else outer)
    return np.array(nearest, np.int64)[tree.node]


def _naive(tree: PrefixTree) -> Array:
    """The node below the root that holds each prompt."""
    top: list[int] = []
    for v, above in enumerate(tree.parent.tolist()):
        top.append(v if above <= 0 else top[above])
    return np.array(top, np.int64)[tree.node]


def _lifting(tree: PrefixTree) -> Array:
    """The rule of BatchLLM's released code (`prefix_clustering.py`), from the leaves up.

    A child g of node c moves up beside c if (leaves(g) - 1) * edge(g) > edge(c): what is saved
    once more for each of its prompts but one, against computing c's tokens once more. A node left
    with one child becomes one with it.
    """
    own, parent = _own(tree), tree.parent.tolist()
    depth, is_now = tree.depth.tolist(), list(range(len(parent)))  # of a node and what it took in
    children: list[list[int]] = [[] for _ in parent]
    for v in range(len(parent) - 1, 0, -1):
        children[parent[v]].append(v)
    prompts = list(own)
    under: list[list[int]] = [[v] for v in range(len(parent))]  # nodes whose prompts are c's
    for c in range(len(parent) - 1, 0, -1):  # children before their parents
        above, stay = parent[c], []
        for g in children[c]:
            saved = (prompts[g] - 1) * (depth[g] - depth[c])
            (children[above] if saved > depth[c] - depth[above] else stay).append(g)
        prompts[c] = own[c] + sum(prompts[g] for g in stay)
        if not own[c] and len(stay) == 1:
            (g,) = stay
            own[c], depth[c], is_now[c] = own[g], depth[g], is_now[g]
            stay = children[g]
            under[c].append(g)
        children[c] = [g for g in stay if prompts[g]]
    top = np.zeros(len(parent), np.int64)
    for c in children[0]:
        todo = [c]
        while todo:
            v = todo.pop()
            top[under[v]] = is_now[c]
            todo.extend(children[v])
    return top[tree.node]


def _plan(tree: PrefixTree, nodes: Array, *, nested: bool) -> PrefixPlan:
    """The plan in which each prompt goes on from a given node of the tree; the root: from none."""
    members: dict[int, list[int]] = {}
    for prompt in tree.order.tolist():
        members.setdefault(int(nodes[prompt]), []).append(prompt)
    alone = members.pop(0, [])
    if not nested:
        alone += [prompt for some in members.values() if len(some) < 2 for prompt in some]
        members = {v: some for v, some in members.items() if len(some) > 1}
    chosen = range(1, len(tree.depth)) if nested else sorted(members)
    number: dict[int, int] = {}
    groups: list[PrefixGroup] = []
    saved = 0
    for v in chosen:
        number[v] = len(groups)
        above = int(tree.parent[v]) if nested else 0
        some = tuple(members.get(v, ()))
        groups.append(PrefixGroup(int(tree.depth[v]), number.get(above, -1), some))
        users = int(tree.leaves[v]) if nested else len(some)
        saved += (users - 1) * int(tree.depth[v] - tree.depth[above])
    return PrefixPlan(tuple(groups), tuple(alone), saved)
