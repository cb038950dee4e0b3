"""The order of a planned batch: much to draw for little to compute goes first.

Decoding and prompts then stay mixed: requests that draw long are running, a token a step each,
while the prompts of those that follow fill the rest of the step.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kvjax.plan.prefix_groups import PrefixPlan

__all__ = ["Turn", "Work", "deal_groups", "group_work", "order_turns"]


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
    """A step of the queue: a group's shared beginning, or a request; and its number."""

    is_group: bool
    number: int


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


def order_turns(plan: PrefixPlan, requests: Sequence[Work], *, by_ratio: bool = True) -> list[Turn]:
    """Every group and every request, in the order of their turns.

    A group is followed by all that goes on from it, so that its pages are held for a short time.

    Args:
        plan: of the requests' prompts.
        requests: their work, whole prompts.
        by_ratio: the largest first; otherwise in the order of the requests, a group's first one
            standing for it.
    """
    groups, own = group_work(plan, requests)
    arrival = [min(group.members, default=len(own)) for group in plan.groups]
    for i in reversed(range(len(arrival))):
        if (above := plan.groups[i].parent) >= 0:
            arrival[above] = min(arrival[above], arrival[i])
    below: dict[int, list[Turn]] = {-1: [Turn(False, m) for m in plan.alone]}
    for i, group in enumerate(plan.groups):
        below.setdefault(group.parent, []).append(Turn(True, i))
        below.setdefault(i, []).extend(Turn(False, m) for m in group.members)

    def urgency(turn: Turn) -> float:
        if by_ratio:
            return (groups if turn.is_group else own)[turn.number].ratio
        return -(arrival[turn.number] if turn.is_group else turn.number)

    turns: list[Turn] = []
    todo = sorted(below[-1], key=urgency)  # a stack: the last goes first
    while todo:
        turn = todo.pop()
        turns.append(turn)
        if turn.is_group:
            todo += sorted(below[turn.number], key=urgency)
    return turns


def deal_groups(
    plan: PrefixPlan, requests: Sequence[Work], replicas: int
) -> tuple[tuple[int, ...], ...]:
    """Deals a batch to replicas: whole groups, the largest first, each to who has the least so far.

    A token drawn counts as one computed: both are one token of a step. A group is never split, but
    for one that holds other groups and more work than a replica's share, as a beginning common to
    all prompts does: the groups in it are dealt, and its own tokens computed wherever they go.

    Args:
        plan: of the requests' prompts.
        requests: their work, whole prompts.
        replicas: one or more, each with its own cache.

    Returns:
        The requests of each replica, ascending.

    Raises:
        ValueError: fewer than one replica.
    """
    if replicas < 1:
        raise ValueError(f"{replicas=} must be 1 or more")
    loads, hands = [0] * replicas, [[] for _ in range(replicas)]
    for size, some in sorted(_pieces(plan, requests, replicas), key=lambda piece: -piece[0]):
        least = min(range(replicas), key=loads.__getitem__)
        loads[least] += size
        hands[least] += some
    return tuple(tuple(sorted(hand)) for hand in hands)


def _pieces(
    plan: PrefixPlan, requests: Sequence[Work], replicas: int
) -> list[tuple[int, list[int]]]:
    """What stays together: its work in tokens, and its requests."""
    groups, own = group_work(plan, requests)
    children: list[list[int]] = [[] for _ in groups]
    members = [list(group.members) for group in plan.groups]  # with all that goes on from each
    for i in reversed(range(len(groups))):
        if (above := plan.groups[i].parent) >= 0:
            children[above].append(i)
            members[above] += members[i]
    todo = [i for i, group in enumerate(plan.groups) if group.parent < 0]
    alone = list(plan.alone)
    share = (sum(sum(groups[i]) for i in todo) + sum(sum(own[m]) for m in alone)) / replicas
    pieces: list[tuple[int, list[int]]] = []
    while todo:
        i = todo.pop()
        if children[i] and sum(groups[i]) > share:
            todo += children[i]
            alone += plan.groups[i].members
        else:
            pieces.append((sum(groups[i]), members[i]))
    return pieces + [(sum(own[m]), [m]) for m in alone]


def _sum(parts: Sequence[Work]) -> Work:
    return Work(sum(part.computes for part in parts), sum(part.draws for part in parts))
