"""What servers do with a batch: the peers of a plan, each in the engine and in the simulator.

All of them find beginnings in a cache that gives up what was used least recently. They differ in
which request is next, and in what a step is made of.
"""

import math
from collections import deque
from collections.abc import Iterator

from kvjax.cache.ledger import PageLedger
from kvjax.plan.first_come import FirstCome, Planned, Request, _Row
from kvjax.plan.group_order import Work, group_work, order_turns
from kvjax.plan.prefix_groups import plan_prefixes
from kvjax.plan.step import Grid

__all__ = ["DualScan", "PrefillFirst", "SortedCome"]


class _Ordered(FirstCome):
    """First come, first served, after the requests that wait have been brought into an order."""

    _new: bool = False

    def add(self, request: Request) -> None:
        """Queues a request; see `FirstCome.add`."""
        super().add(request)
        self._new = True

    def plan(self) -> Planned | None:
        """The next call, or None if nothing can be planned before another is accepted."""
        if self._new:
            self._waiting = deque(self._order(list(self._waiting)))
            self._new = False
        return super().plan()

    def _order(self, rows: list[_Row]) -> list[_Row]:
        raise NotImplementedError


class SortedCome(_Ordered):
    """Sorted by tokens: those with the same beginning follow each other, the cache does the rest.

    It computes about as little as a plan does, unless memory is scarce; it is the peer to beat.
    """

    def _order(self, rows: list[_Row]) -> list[_Row]:
        return sorted(rows, key=lambda row: row.request.prompt)


class DualScan(_Ordered):
    """BlendServe's order (arXiv 2411.16102): the batch is a tree of beginnings, sorted by how much
    is drawn for what is computed, and taken from both ends.

    From which end the next request comes is what brings the work so far nearest to the mixture of
    the whole batch, so that steps have both prompts and decoding; each end keeps its beginnings
    together. Expected lengths are those of the requests.
    """  # fmt: skip

    def _order(self, rows: list[_Row]) -> list[_Row]:
        pieces = list(self._pieces(rows))
        computes = sum(work.computes for _, work in pieces)
        goal = sum(work.draws for _, work in pieces) / max(computes, 1)
        ends, done = deque(pieces), Work(0, 0)
        found: list[_Row] = []
        while ends:
            row, work = ends.popleft() if done.ratio <= goal else ends.pop()
            done = Work(done.computes + work.computes, done.draws + work.draws)
            found.append(row)
        return found

    def _pieces(self, rows: list[_Row]) -> Iterator[tuple[_Row, Work]]:
        """Requests, those that draw most for what they compute first, with what each adds."""
        requests = [row.request for row in rows]
        plan = plan_prefixes([request.prompt[:-1] for request in requests], self.grid.page_size)
        most = [row.limit - len(row.request.prompt) for row in rows]
        whole = [
            Work(len(request.prompt), min(n, request.expected))
            for n, request in zip(most, requests, strict=True)
        ]
        _, own = group_work(plan, whole)
        shared = 0
        for is_group, i in order_turns(plan, whole):
            if is_group:  # the first that goes on from it computes it
                group = plan.groups[i]
                above = plan.groups[group.parent].length if group.parent >= 0 else 0
                shared += group.length - above
            else:
                yield rows[i], Work(own[i].computes + shared, own[i].draws)
                shared = 0


class PrefillFirst(FirstCome):
    """SGLang's scheduler without mixed steps (`schedule_policy.py`, as of sglang-jax in 2026).

    While there are prompts to compute nobody decodes. Of a short queue the request with the longest
    beginning in the cache is next; a longer one is first come, first served. A request is begun if
    there is room for all it may draw and for a part of what the others may: a part that shrinks as
    they decode without running out of memory. If they do, those that have drawn least wait again.
    """

    sorted_queue: int = 128
    first_part: float = 0.7
    least_part: float = 0.098
    decodes: int = 600
    """Decoding steps until the least part is reached."""
    steps_ahead: int = 20
    """After running out: tokens that each is expected to draw before the next time."""

    def __init__(self, grid: Grid, ledger: PageLedger, *, grouped: bool = False) -> None:
        super().__init__(grid, ledger, optimistic=True, grouped=grouped)
        self._part: float = self.first_part
        self._prompts_only: bool = False

    def plan(self) -> Planned | None:
        """The next call, or None if nothing can be planned before another is accepted."""
        if 1 < len(self._waiting) <= self.sorted_queue:
            found = {id(row): self.trie.found(row.tokens[:-1]) for row in self._waiting}
            self._waiting = deque(sorted(self._waiting, key=lambda row: -found[id(row)]))
        self._prompts_only = True
        planned = super().plan()
        if planned is None:
            self._prompts_only = False
            planned = super().plan()
            fall = (self.first_part - self.least_part) / self.decodes
            self._part = max(self.least_part, self._part - fall)
        return planned

    def _decoding(self) -> list[_Row]:
        return [] if self._prompts_only else super()._decoding()

    def _need(self, row: _Row) -> int:
        own = row.future_pages(self.grid.page_size)
        return own + math.ceil(self._part * self.promised_pages)

    def _throw_out_after(self, row: _Row) -> bool:
        if self._prompts_only:  # of these some are planned already
            return super()._throw_out_after(row)
        least = min(self._rows, key=self._drawn)
        if least is row:
            return False
        self._throw_out(least)
        return True

    def _throw_out(self, row: _Row) -> None:
        super()._throw_out(row)
        if self._rows:
            soon = sum(self._drawn(other)[0] + self.steps_ahead for other in self._rows)
            most = sum(other.limit - len(other.request.prompt) for other in self._rows)
            self._part = min(1.0, soon / max(most, 1))

    def _drawn(self, row: _Row) -> tuple[int, int]:
        """Tokens drawn; of equals, the one with the longer prompt is thrown out first."""
        prompt = len(row.request.prompt)
        return len(row.tokens) + row.inflight - prompt, -prompt
