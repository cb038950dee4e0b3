"""The order of a planned batch: much to draw for little to compute goes first.

Decoding and prompts then stay mixed: requests that draw long are running, a token a step each,
while the prompts of those that follow fill the rest of the step.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kvjax.plan.prefix_groups import PrefixPlan

__all__ = ["Turn", "Work", "group_work", "order_turns"]


class Work(NamedTuple):
    """What a request or a group of them brings, in tokens.

    Attributes:
        computes: of prompts, a shared beginning counted once.
        draws: expected.
    """

    computes: int
    draws: int

    @property
    def ratio(self) -> float:
        """Of decoding to prefill; BatchLLM's R of a group."""
        return self.draws / max(self.computes, 1)


class Turn(NamedTuple):
    """A step of the queue: a group's shared beginning, or a request; and its index."""

    is_group: bool
    index: int


def group_work(plan: PrefixPlan, requests: Sequence[Work]) -> tuple[list[Work], list[Work]]:
    """The work of each group with all that goes on from it, and of each request by itself.

    Args:
        plan: of the requests' prompts.
        requests: their whole prompts.
    """
    own = list(requests)
    groups = [Work(0, 0)] * len(plan.groups)
    for i in reversed(range(len(groups))):  # children before their parents
        group = plan.groups[i]
        for m in group.members:
            own[m] = Work(requests[m].computes - group.length, requests[m].draws)
        above = plan.groups[group.parent].length if group.parent >= 0 else 0
        parts = [groups[i], Work(group.length - above, 0), *(own[m] for m in group.members)]
        groups[i] = _sum(parts)
        if group.parent >= 0:
            groups[group.parent] = _sum([groups[group.parent], groups[i]])
    return groups, own


def order_turns(plan: PrefixPlan, requests: Sequence[Work]) -> list[Turn]:
    """Every group and every request, in the order of their turns.

    A group is followed by all that goes on from it, so that its pages are held for a short time.

    Args:
        plan: of the requests' prompts.
        requests: their work, whole prompts.
    """
    groups, own = group_work(plan, requests)
    below: dict[int, list[Turn]] = {-1: [Turn(False, m) for m in plan.alone]}
    for i, group in enumerate(plan.groups):
        below.setdefault(group.parent, []).append(Turn(True, i))
        below.setdefault(i, []).extend(Turn(False, m) for m in group.members)

    def ratio(turn: Turn) -> float:
        return (groups if turn.is_group else own)[turn.index].ratio

    turns: list[Turn] = []
    todo = sorted(below[-1], key=ratio)  # a stack: the last goes first
    while todo:
        turn = todo.pop()
        turns.append(turn)
        if turn.is_group:
            todo += sorted(below[turn.index], key=ratio)
    return turns


def _sum(parts: Sequence[Work]) -> Work:
    return Work(sum(part.computes for part in parts), sum(part.draws for part in parts))
