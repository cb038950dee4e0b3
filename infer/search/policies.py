"""How a tree search goes on: each policy deals out a level's width among its leaves.

Pure objects: leaves and a width in, how many continuations each gets and why others get none out.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from kvjax.errors import InputError
from kvjax.infer.search.tree import Node, level_of, page_level_of
from kvjax.plan.tree_pruning import Level, Selection, ets_select, rebase_allocation, shares

__all__ = [
    "DVTS", "ETS", "Allocation", "Beam", "BestOfN", "Clusters", "Frontier", "Policy", "Rebase",
]  # fmt: skip

Array = np.ndarray
Clusters = Callable[[Sequence[Node]], Array]
"""Leaves -> int[N]: those with equal numbers say the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """What a policy decides about.

    Attributes:
        leaves: that may be continued, in the order of their paths.
        width: continuations to deal out: what was asked for less the leaves that have ended.
        full_width: what was asked for.
        ended: the leaves that have ended, of all levels.
        page_size: of the cache.
    """

    leaves: Sequence[Node]
    width: int
    full_width: int
    ended: Sequence[Node] = ()
    page_size: int = 1

    @property
    def scores(self) -> Array:
        """float[N]."""
        return np.asarray([leaf.score for leaf in self.leaves])


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What a policy decided.

    Attributes:
        counts: int[N], continuations of each leaf.
        fates: why a leaf gets none; "" for those that get some.
        kept: leaves that were chosen to live; all with a count, perhaps others too.
    """

    counts: Array
    fates: tuple[str, ...]
    kept: int

    @staticmethod
    def of(counts: Array, fate: str | Sequence[str], kept: int | None = None) -> "Allocation":
        """With one fate for all that get nothing, or one for each."""
        fates = [fate] * len(counts) if isinstance(fate, str) else fate
        named = tuple("" if n else f for n, f in zip(counts, fates, strict=True))
        return Allocation(counts, named, int((counts > 0).sum()) if kept is None else kept)


class Policy(Protocol):
    """What a search asks at each level."""

    def allocate(self, frontier: Frontier) -> Allocation:
        """Deals out the width; whatever gets nothing is given up."""
        ...


@dataclasses.dataclass(frozen=True)
class BestOfN:
    """Independent samples, which are continued as they are: N of them, and no tree."""

    def allocate(self, frontier: Frontier) -> Allocation:
        """The whole width to the root, then one to each leaf."""
        if frontier.leaves[0].parent is None:
            return Allocation.of(np.asarray([frontier.width]), "")
        return Allocation.of(np.asarray([leaf.count for leaf in frontier.leaves]), "")


@dataclasses.dataclass(frozen=True)
class Beam:
    """The best `beams` leaves, each continued equally often; None: the root of the width."""

    beams: int | None = None

    def allocate(self, frontier: Frontier) -> Allocation:
        """Spends the width exactly: what cannot be split goes to the best."""
        beams = self.beams or math.ceil(math.sqrt(frontier.width))
        best = np.argsort(-frontier.scores, kind="stable")[: min(beams, frontier.width)]
        counts = np.zeros(len(frontier.leaves), int)
        each, more = divmod(frontier.width, len(best))
        counts[best] = each
        counts[best[:more]] += 1
        return Allocation.of(counts, "not among the best")


@dataclasses.dataclass(frozen=True)
class DVTS:
    """Diverse verifier tree search (Beeching et al. 2024): subtrees that do not compete.

    The root's children are dealt to `subtrees` groups; from then on each group goes on from its
    best leaf with its part of the width, less its leaves that have ended. None: the root of the
    width.
    """

    subtrees: int | None = None

    def allocate(self, frontier: Frontier) -> Allocation:
        """The best leaf of each group, or all of it to the root."""
        if frontier.leaves[0].parent is None:
            return Allocation.of(np.asarray([frontier.width]), "")
        groups = self.subtrees or math.ceil(math.sqrt(frontier.full_width))
        of = [self._group(leaf, groups, frontier.full_width) for leaf in frontier.leaves]
        ended = np.bincount(
            [self._group(leaf, groups, frontier.full_width) for leaf in frontier.ended],
            [leaf.count for leaf in frontier.ended], minlength=groups,
        ).astype(int)  # fmt: skip
        counts, scores = np.zeros(len(of), int), frontier.scores
        for group in sorted(set(of)):
            own = [i for i, g in enumerate(of) if g == group]
            best = max(own, key=lambda i: (scores[i], -i))
            counts[best] = max(0, frontier.full_width // groups - ended[group])
        return Allocation.of(counts, "not the best of its subtree")

    @staticmethod
    def _group(leaf: Node, groups: int, width: int) -> int:
        return min(leaf.path[0] * groups // width, groups - 1)


@dataclasses.dataclass(frozen=True)
class Rebase:
    """REBASE (Wu et al. 2024): the width by the softmax of the scores."""

    temperature: float = 0.2

    def allocate(self, frontier: Frontier) -> Allocation:
        """Leaves that stand for several are dealt to as several."""
        counts = spread(frontier, frontier.scores, self.temperature)
        return Allocation.of(counts, "no share")


def spread(
    frontier: Frontier, scores: Array, temperature: float, width: int | None = None
) -> Array:
    """REBASE's allocation of a frontier, the shares of equal siblings summed: int[N]."""
    counts = np.asarray([leaf.count for leaf in frontier.leaves])
    which = np.repeat(np.arange(len(counts)), counts)
    width = frontier.width if width is None else width
    dealt = rebase_allocation(scores[which], width, temperature)
    return np.bincount(which, dealt, minlength=len(counts)).astype(int)


@dataclasses.dataclass(frozen=True)
class ETS:
    """Efficient tree search (Hooper et al. 2025): a program prunes, then REBASE deals.

    Attributes:
        lambda_b: what the cache of the whole level costs.
        lambda_d: what it is worth to keep a leaf of every cluster.
        temperature: of the softmax.
        clusters: which leaves say the same; None: coverage is worth nothing.
        cost: "nodes", every step the same, as published, or "pages", what is really given back.
        floor_one: whether every leaf that was kept gets a continuation. Without it, as published,
            a leaf that was kept for what it covers is often given none.
        seconds: after which the program's best so far is taken; None: never.
        program: solves the program instead of HiGHS, such as a `DeviceProgram`; None: exactly.
    """

    lambda_b: float = 1.0
    lambda_d: float = 1.0
    temperature: float = 0.2
    clusters: Clusters | None = None
    cost: str = "nodes"
    floor_one: bool = True
    seconds: float | None = None
    program: Callable[[Level, Array, float, float], Selection] | None = None

    def __post_init__(self) -> None:
        if self.cost not in ("nodes", "pages"):
            raise InputError(f"the cost of a node is {self.cost!r}: use nodes or pages")

    def allocate(self, frontier: Frontier) -> Allocation:
        """Chooses the survivors, then deals them the whole width."""
        rewards = shares(spread(frontier, frontier.scores, self.temperature))
        leaves = frontier.leaves
        pages = self.cost == "pages"
        level = page_level_of(leaves, frontier.page_size) if pages else level_of(leaves)
        if self.clusters is not None and self.lambda_d > 0 and len(leaves) > 1:
            level = dataclasses.replace(level, cluster=np.asarray(self.clusters(leaves)))
        kept = self._select(level, rewards).leaves
        counts = self._deal(frontier, kept)
        fates = ["no share" if keep else "pruned by the program" for keep in kept]
        return Allocation.of(counts, fates, int(kept.sum()))

    def _select(self, level: Level, rewards: Array) -> Selection:
        if self.program is not None and self.lambda_b > 0:
            return self.program(level, rewards, self.lambda_b, self.lambda_d)
        return ets_select(level, rewards, self.lambda_b, self.lambda_d, seconds=self.seconds)

    def _deal(self, frontier: Frontier, kept: Array) -> Array:
        scores = np.where(kept, frontier.scores, -np.inf)
        if not self.floor_one:
            return spread(frontier, scores, self.temperature)
        # One for each, the best first where there are more of them than the width.
        best = np.argsort(-scores, kind="stable")[: min(int(kept.sum()), frontier.width)]
        first = np.zeros(len(scores), int)
        first[best] = 1
        rest = np.where(first > 0, scores, -np.inf)
        return first + spread(frontier, rest, self.temperature, frontier.width - len(best))
