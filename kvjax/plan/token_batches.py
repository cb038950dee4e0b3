"""BatchLLM's planner (arXiv 2412.03594): the whole batch is known, so everything is decided ahead.

What prompts share is planned before anything runs (`prefix_groups`). A shared beginning is a row of
its own that draws nothing; its members go next, so a group runs to its end before another begins,
and its pages are held until its last member ends: they are computed once, however little memory
there is. Groups with much to draw for what is to be computed first go first, so that there is
always something to decode beside prompts, and calls stay full.

How many rows run is decided by memory and not by a number of rows: give the grid as many seats as
memory may feed.
"""

import dataclasses
from collections.abc import Collection

import numpy as np

from kvjax.cache.ledger import PageLedger
from kvjax.cache.trie import Branch
from kvjax.plan.first_come import FirstCome, Planned, Request, Sampled, _Row
from kvjax.plan.group_order import Work, order_turns
from kvjax.plan.prefix_groups import Method, PrefixPlan, plan_prefixes
from kvjax.plan.step import Grid

__all__ = ["TokenBatches"]


@dataclasses.dataclass(eq=False)
class _Group:
    """A shared beginning while it is needed.

    Attributes:
        length: in tokens.
        parent: whose pages it goes on from.
        users: members and groups that go on from here and have not ended.
        row: that computes it; None once it is computed.
        branch: its pages, from then on.
    """

    length: int
    parent: "_Group | None"
    users: int
    row: _Row | None = None
    branch: Branch = dataclasses.field(default_factory=Branch)


class TokenBatches(FirstCome):
    """Plans calls for batches: requests added before a `plan` are one batch, planned as a whole.

    Requests that come later are a batch of their own, after those before.

    Attributes:
        method: what is shared, see `plan_prefixes`. "multi" also goes on from pages that happen to
            be in the cache; with the others exactly what is planned is computed.
        by_ratio: whether groups with much to draw go first, instead of those that came first.
        planned_savings: prompt tokens that the plans so far need not compute.
    """

    def __init__(
        self, grid: Grid, ledger: PageLedger, *, method: Method = "multi", by_ratio: bool = True,
        optimistic: bool = False, grouped: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(grid, ledger, optimistic=optimistic, grouped=grouped)
        self.method: Method = method
        self.by_ratio: bool = by_ratio
        self.planned_savings: int = 0
        self._new: list[_Row] = []
        self._group_of: dict[int, _Group] = {}  # by ids, the prefixes' own included: below 0
        self._pinned: list[_Group] = []  # computed, oldest first
        self._prefixes = 0
        # Requests that a token may end: how many have ended, and with how many tokens in all.
        self._stopped = self._stopped_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return super().busy or bool(self._new)

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: it can never be answered, or its id is below 0: those are the prefixes'.
        """
        if request.id < 0:
            raise ValueError(f"{request.id=} must not be below 0")
        super().add(request)
        self._new.append(self._waiting.pop())

    def cancel(self, ids: Collection[int]) -> None:
        """Forgets requests, wherever they are."""
        gone = set(ids)
        dropped = [row for row in self._new if row.request.id in gone]
        self._new = [row for row in self._new if row.request.id not in gone]
        for row in dropped:
            row.done = True
            del self._known[row.request.id]
        super().cancel(ids)

    def plan(self) -> Planned | None:
        """The next call, or None if nothing can be planned before another is accepted."""
        if self._new:
            self._arrange(self._new)
            self._new = []
        return super().plan()

    def accept(self, planned: Planned, drawn: np.ndarray) -> list[Sampled]:
        """Takes what a planned call drew; see `FirstCome.accept`."""
        rows = {entry.row.request.id: entry.row for entry in planned.entries}
        found = [news for news in super().accept(planned, drawn) if news.id >= 0]
        for row in [rows[news.id] for news in found if news.finish_reason]:
            if row.request.stop_ids:
                self._stopped += 1
                self._stopped_tokens += len(row.tokens) - len(row.request.prompt)
        return found

    def _arrange(self, rows: list[_Row]) -> None:
        """Puts a batch into the queue, in the order in which it is to run."""
        usable = [row.request.prompt[: self._usable(row)] for row in rows]
        plan = plan_prefixes(usable, self.grid.page_size, self.method)
        self.planned_savings += plan.saved
        groups = self._make_groups(plan, rows)
        work = [Work(len(row.request.prompt), self._expected(row)) for row in rows]
        for is_group, i in order_turns(plan, work, by_ratio=self.by_ratio):
            row = groups[i].row if is_group else rows[i]
            assert row is not None, "a new group has its row"
            self._waiting.append(row)
            self._known[row.request.id] = row

    def _make_groups(self, plan: PrefixPlan, rows: list[_Row]) -> list[_Group]:
        groups: list[_Group] = []
        for planned in plan.groups:
            parent = groups[planned.parent] if planned.parent >= 0 else None
            if parent is not None:
                parent.users += 1
            groups.append(_Group(planned.length, parent, len(planned.members)))
            for i in planned.members:
                self._group_of[rows[i].request.id] = groups[-1]
        example: dict[int, int] = {}  # of each group, a prompt that begins with it
        for i in reversed(range(len(groups))):
            some = plan.groups[i].members[0] if plan.groups[i].members else example[i]
            example[i] = some
            example.setdefault(plan.groups[i].parent, some)
            self._prefixes += 1
            prompt = rows[some].request.prompt[: groups[i].length]
            request = Request(id=-self._prefixes, prompt=prompt, max_tokens=0)
            groups[i].row = _Row(request, len(prompt), list(prompt))
            self._group_of[request.id] = groups[i]
        return groups

    def _usable(self, row: _Row) -> int:
        """How much of a prompt may be found in the cache; the rest is computed in any case."""
        end = len(row.request.prompt) - 1
        if row.request.score_from is not None and row.scored < len(row.request.prompt):
            end = min(end, row.scored - 1)
        return end

    def _expected(self, row: _Row) -> int:
        """Tokens that a request is expected to draw. Only the order depends on it."""
        most = row.limit - len(row.request.prompt)
        if row.request.expected_tokens is None and row.request.stop_ids and self._stopped:
            return min(most, round(self._stopped_tokens / self._stopped))
        return min(most, row.request.expected)

    def _admit(self, row: _Row) -> bool:
        """Finds the pages that hold a row's beginning, if its other pages can be had."""
        if row.inflight:
            return False  # thrown out; its last tokens are on their way
        self.trie.match(row.branch, row.tokens[: self._match_end(row)])
        while not self._fits(row):
            if self._rows or self._ending or not self._unpin(row):
                self.trie.release(row.branch)
                return False
        return True

    def _match_end(self, row: _Row) -> int:
        group = self._group_of.get(row.request.id)
        if self.method == "multi" or len(row.tokens) > len(row.request.prompt):
            drawn = len(row.tokens) - 1
            return self._usable(row) if drawn < len(row.request.prompt) else drawn
        if group is None or group.row is row:
            return 0
        return group.length

    def _fits(self, row: _Row) -> bool:
        """Whether a row's pages can be had; a prefix needs those of its first member too."""
        size = self.grid.page_size
        first = row
        if row.request.id < 0:
            first = next(r for r in self._waiting if r.request.id >= 0)
        if self.optimistic:
            # A page for every other row, so that it is not thrown out in the next step.
            need = -(-len(first.tokens) // size) + len(self._rows)
        else:
            need = first.future_pages(size) + len(first.branch.pages)
            need += self.promised_pages
        return need - len(row.branch.pages) <= self.ledger.available

    def _throw_out_after(self, row: _Row) -> bool:
        return super()._throw_out_after(row) or (self.optimistic and self._unpin(row))

    def _unpin(self, row: _Row) -> bool:
        """Gives up the youngest prefix that no running row and not this one goes on from.

        What of it is needed again is computed again.
        """
        used: set[int] = set()
        for user in (*self._rows, *self._ending, row):
            group = self._group_of.get(user.request.id)
            while group is not None:
                used.add(id(group))
                group = group.parent
        for group in reversed(self._pinned):
            if id(group) not in used:
                self._pinned.remove(group)
                self.trie.release(group.branch)
                return True
        return False

    def _end(self, row: _Row) -> None:
        group = self._group_of.pop(row.request.id, None)
        if group is not None and group.row is row:
            # Its pages stay until its last member ends.
            group.row = None
            group.branch, row.branch = row.branch, Branch()
            self._pinned.append(group)
            super()._end(row)
            self._leave_group(group, users=0)
            return
        super()._end(row)
        if group is not None:
            self._leave_group(group)

    def _leave_group(self, group: _Group | None, users: int = 1) -> None:
        """Counts users less, and gives up what nobody uses any more, up to the root."""
        while group is not None:
            group.users -= users
            if group.users:
                return
            if group.row is not None:  # nobody will need it
                row, group.row = group.row, None
                del self._group_of[row.request.id]
                super()._end(row)
            elif group in self._pinned:
                self._pinned.remove(group)
                self.trie.release(group.branch)
            group, users = group.parent, 1
