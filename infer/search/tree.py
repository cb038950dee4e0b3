"""The tree of one question: its nodes, and how much cache it takes.

A node is one step of reasoning. The root is the prompt.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from kvjax.plan.tree_pruning import Level

__all__ = ["KVSizes", "Node", "fold_seed", "kv_sizes", "level_of", "page_level_of"]


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """One step.

    Attributes:
        parent: None for the root.
        tokens: of this step alone.
        text: of this step alone.
        path: which child of which child it is, from the root on; it names the node.
        score: the reward model's, of everything up to here; the root's is 1.
        finished: whether a solution ends here.
        count: how many equal siblings it stands for.
        fate: why it was not continued: "finished", "too long", or what the policy said; "" while
            it lives and where it was continued.
        width: how many continuations it was given.
        children: in the order of their paths.
    """

    parent: "Node | None"
    tokens: tuple[int, ...]
    text: str = ""
    path: tuple[int, ...] = ()
    score: float = 1.0
    finished: bool = False
    count: int = 1
    fate: str = ""
    width: int = 0
    children: "list[Node]" = dataclasses.field(default_factory=list)

    @property
    def depth(self) -> int:
        """Steps from the root."""
        return len(self.path)

    def lineage(self) -> "list[Node]":
        """From the root to this node, both included."""
        nodes, node = [], self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def sequence(self) -> tuple[int, ...]:
        """All tokens from the prompt's first on."""
        return tuple(token for node in self.lineage() for token in node.tokens)

    def steps(self) -> list[str]:
        """The texts of the steps, without the prompt."""
        return [node.text for node in self.lineage()[1:]]

    def answer(self) -> str:
        """All that was written."""
        return "".join(self.steps())

    def scores(self) -> list[float]:
        """Of each step."""
        return [node.score for node in self.lineage()[1:]]

    def walk(self) -> "Iterator[Node]":
        """Itself and all nodes below, depth first."""
        yield self
        for child in self.children:
            yield from child.walk()


def fold_seed(seed: int, question: int, path: Iterable[int]) -> int:
    """A seed in 0..2**32-1 for the draws of one node: it depends on nothing else."""
    text = " ".join(map(str, (seed, question, *path)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


@dataclasses.dataclass(frozen=True)
class KVSizes:
    """Tokens whose keys and values a set of leaves needs.

    Attributes:
        nodes: every leaf by itself and every ancestor once, as the paper counts.
        unique: equal steps after equal beginnings once, as a cache by content holds them.
    """

    nodes: int
    unique: int


def kv_sizes(leaves: Sequence[Node]) -> KVSizes:
    """Tokens of leaves and of their ancestors, the prompt included."""
    seen: dict[int, int] = {}
    texts: dict[tuple[tuple[int, ...], ...], int] = {}
    for leaf in leaves:
        lineage = leaf.lineage()
        for depth, node in enumerate(lineage):
            seen[id(node)] = len(node.tokens) * (node.count if node is leaf else 1)
            texts[tuple(n.tokens for n in lineage[: depth + 1])] = len(node.tokens)
    return KVSizes(sum(seen.values()), sum(texts.values()))


def level_of(leaves: Sequence[Node]) -> Level:
    """The leaves' tree for the selection program, in which every node costs the same."""
    number: dict[int, int] = {}
    parents: list[int] = []
    for leaf in leaves:
        above = -1
        for node in leaf.lineage()[:-1] or [leaf]:
            if id(node) not in number:
                number[id(node)] = len(parents)
                parents.append(above)
            above = number[id(node)]
    last = [number[id(leaf.parent or leaf)] for leaf in leaves]
    return dataclasses.replace(
        Level.uniform(parents, last), leaf_cost=np.asarray([float(leaf.count) for leaf in leaves])
    )


def page_level_of(leaves: Sequence[Node], page_size: int) -> Level:
    """The leaves' tree of pages: what the program then saves is what is really given back.

    A node is one full page with all that is before it, however many leaves share it; a leaf costs
    nothing beside its pages.
    """
    number: dict[tuple[int, tuple[int, ...]], int] = {}
    parents: list[int] = [-1]  # all of them, and nothing: it costs no page
    last = []
    for leaf in leaves:
        tokens, at = leaf.sequence(), 0
        for start in range(0, len(tokens) - page_size + 1, page_size):
            key = (at, tokens[start : start + page_size])
            if key not in number:
                number[key] = len(parents)
                parents.append(at)
            at = number[key]
        last.append(at)
    cost: Any = np.ones(len(parents))
    cost[0] = 0.0
    return Level(
        parent=np.asarray(parents), leaf_parent=np.asarray(last), node_cost=cost,
        leaf_cost=np.zeros(len(leaves)),
    )  # fmt: skip
