"""First come, first served, with shared prefixes: the plainest planner.

Rows that decode go first, then the rows whose prompts are unfinished, then new requests while
tokens, seats and pages last. A prompt is admitted when the tokens before it are planned, so a
prefix that several prompts share is computed once and found by all the others.

Planning does not wait for the device: a call may be planned while the tokens of earlier calls are
still being drawn. A row then counts tokens that it does not know yet. Whether it has ended by a
stop token is learnt late, and what was computed in the meantime is dropped; that it ends by its
length is known ahead, and its seat is given on at once.

Admission is safe by default: a request is seated only when the pages that it may ever need are
there, so nothing that has begun is thrown out. Optimistic admission asks only for the pages of the
tokens that there are; when pages run out, the youngest rows lose theirs and compute their tokens
again later. The oldest row is never thrown out, so everything ends.
"""

import dataclasses
from collections import deque
from collections.abc import Collection
from typing import Any

import numpy as np

from kvjax.cache.ledger import OutOfPages, PageLedger
from kvjax.cache.trie import Branch, PrefixTrie
from kvjax.plan.sharing import order_sharers
from kvjax.plan.step import Bucket, Grid, Run, StepPlan, pack

__all__ = ["FirstCome", "Planned", "Request", "Sampled", "Seat"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        id: names it in what the planner returns.
        prompt: token ids, at least one.
        max_tokens: to draw; less if the row's pages end before, 0 only computes the prompt.
        expected_tokens: how many of them there will be, as far as known: `TokenBatches` orders by
            it. None: nothing is known.
        stop_ids: tokens that end it.
        score_from: the first token of the prompt, 1 or later, whose log-probability is wanted,
            with all that follow it; None: of none.
        logprobs: whether log-probabilities of the drawn tokens are wanted.
        greedy: whether the likeliest tokens are wanted and nothing else.
        sampling: handed to the device with the seat; the planner does not look at it.
    """

    id: int
    prompt: tuple[int, ...]
    max_tokens: int
    expected_tokens: int | None = None
    stop_ids: frozenset[int] = frozenset()
    score_from: int | None = None
    logprobs: bool = False
    greedy: bool = True
    sampling: Any = None

    @property
    def expected(self) -> int:
        """Tokens that it is expected to draw; where nothing is known, the most."""
        if self.expected_tokens is None:
            return self.max_tokens
        return min(self.max_tokens, self.expected_tokens)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What a call brought a request.

    Attributes:
        id: of the request.
        tokens: those drawn, in order; none for a call that only scored.
        finish_reason: "stop" or "length" with the last ones.
        column: the row's place among those that drew.
        scored: the first and the end of the places whose targets are the prompt's next tokens.
    """

    id: int
    tokens: tuple[int, ...]
    finish_reason: str | None
    column: int
    scored: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Seat:
    """A seat to give before a call: its row gets the pages of the first `length` tokens."""

    row: int
    pages: list[int]
    tokens: list[int]
    length: int
    request: Request


@dataclasses.dataclass(frozen=True)
class Planned:
    """A call: seats to give before it, its shape, its data, and who is to get what it draws."""

    seats: tuple[Seat, ...]
    bucket: Bucket
    step: StepPlan[np.ndarray]
    entries: tuple["_Entry", ...]


@dataclasses.dataclass(eq=False)
class _Row:
    request: Request
    limit: int  # tokens, prompt included, that it may come to
    tokens: list[int]  # those known
    inflight: int = 0  # drawn by calls whose results are not back
    calls: int = 0  # these, and those that draw nothing for it
    length: int = 0  # tokens whose keys and values are planned
    scored: int = 0  # the next token of the prompt to score
    seat: int = -1
    branch: Branch = dataclasses.field(default_factory=Branch)
    done: bool = False
    most: int = dataclasses.field(init=False)  # tokens in its pages at its end: not its last one

    def __post_init__(self) -> None:
        self.most = max(self.limit - 1, len(self.request.prompt))

    @property
    def outstanding(self) -> int:
        """Tokens to compute before another can be drawn."""
        return len(self.tokens) + self.inflight - self.length

    @property
    def draws_left(self) -> int:
        return self.limit - len(self.tokens) - self.inflight

    def future_pages(self, page_size: int) -> int:
        """Pages that it may yet need."""
        return -(-self.most // page_size) - len(self.branch.pages)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What a row does in a call."""

    row: _Row
    draws: int
    column: int
    scored: tuple[int, int] | None


class FirstCome:
    """Plans calls for the requests it is given: `plan` one, run it, `accept` what it drew.

    Several calls may be planned before the first is accepted; they are accepted in order.

    Args:
        grid: the static sizes.
        ledger: the pages.
        optimistic: see above.
        grouped: whether pages that rows share are read once for all of them, if the grid has work
            items for it.
    """

    def __init__(
        self, grid: Grid, ledger: PageLedger, *, optimistic: bool = False, grouped: bool = True
    ) -> None:
        self.grid = grid
        self.ledger = ledger
        self.optimistic = optimistic
        # What is in the seats' tables, if rows are to read shared pages together.
        self._tables: np.ndarray | None = None
        if grouped and grid.shared_pages:
            self._tables = np.zeros((grid.max_rows, grid.pages_per_row), np.int32)
        self.trie: PrefixTrie = PrefixTrie(ledger, grid.page_size)
        self.prefill_tokens_computed: int = 0
        self.preemptions: int = 0
        # What the seated rows may yet need, while others are admitted.
        self.promised_pages: int = 0
        self._known: dict[int, _Row] = {}  # all unfinished ones, by the ids of their requests
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []  # seated, oldest first
        self._ending: set[_Row] = set()  # all planned; their pages are held until their tokens come
        self._free_seats = list(range(grid.max_rows - 1, -1, -1))

    @property
    def capacity(self) -> int:
        """The most tokens that a row can hold, its last one excepted."""
        return min(self.grid.max_length, self.ledger.num_pages * self.grid.page_size)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._rows or self._ending)

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: it can never be answered.
        """
        if not request.prompt:
            raise ValueError("the prompt has no tokens")
        if len(request.prompt) > self.capacity:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens, a row holds {self.capacity}"
            )
        limit = min(len(request.prompt) + request.max_tokens, self.capacity + 1)
        row = _Row(request, limit, list(request.prompt), scored=request.score_from or 0)
        self._waiting.append(row)
        self._known[request.id] = row

    def cancel(self, ids: Collection[int]) -> None:
        """Forgets requests, wherever they are."""
        for row in [self._known[i] for i in ids if i in self._known]:
            self._end(row)

    def plan(self) -> Planned | None:
        """The next call, or None if nothing can be planned before another is accepted."""
        budget = self.grid.token_buckets[-1]
        decoding = self._decoding()
        if self.optimistic:  # otherwise their pages are promised
            decoding = [row for row in decoding if self._reserve(row, 1)]
        budget -= len(decoding)
        seats: list[Seat] = []
        runs: list[tuple[_Row, Run]] = []
        # A prompt that is only computed may have one token left: others may find its page at once.
        for row in [row for row in self._rows if row.outstanding > (row.draws_left > 0)]:
            if budget and row.seat >= 0 and (run := self._chunk(row, budget)):
                runs.append((row, run))
                budget -= len(run.tokens)
        size = self.grid.page_size
        if self._waiting:
            self.promised_pages = sum(row.future_pages(size) for row in self._rows)
        while budget and self._waiting and self._free_seats and self._admit(self._waiting[0]):
            row = self._waiting.popleft()
            seats.append(self._seat(row))
            run = self._chunk(row, budget)
            assert run is not None, "an admitted request has the pages of its tokens"
            runs.append((row, run))
            budget -= len(run.tokens)
            self.promised_pages += row.future_pages(size)
        singles = [row for row in decoding if row.seat >= 0]  # some may have been thrown out since
        steps = 1 if runs else self._steps(singles)
        runs = [(row, self._single(row, steps)) for row in singles] + runs
        return self._pack(seats, runs, steps) if runs else None

    def _decoding(self) -> list[_Row]:
        """The rows that may draw their next token."""
        return [row for row in self._rows if row.outstanding == 1 and row.draws_left]

    def accept(self, planned: Planned, drawn: np.ndarray) -> list[Sampled]:
        """Takes what a planned call drew.

        Args:
            planned: the earliest call not yet accepted.
            drawn: int32[S, B] in the plan's order; below 0 after a row's last token.

        Returns:
            What came to whom; nothing for requests that ended before.
        """
        sampled = []
        for entry in planned.entries:
            row = entry.row
            row.inflight -= entry.draws
            row.calls -= 1
            if not row.done:
                tokens = drawn[: entry.draws, entry.column].tolist() if entry.draws else []
                tokens, reason = self._take(row, tokens)
                if tokens or reason or entry.scored:
                    news = Sampled(row.request.id, tokens, reason, entry.column, entry.scored)
                    sampled.append(news)
        return sampled

    def _take(self, row: _Row, drawn: list[int]) -> tuple[tuple[int, ...], str | None]:
        """Gives a row its tokens; also says why it has ended, if it has."""
        reason, count = None, 0
        for token in drawn:
            if token < 0 or reason:
                break
            row.tokens.append(token)
            reason = "stop" if token in row.request.stop_ids else None
            count += 1
        # A token that ends a row may have been drawn before the call's last step: the call then did
        # not bring it, and nobody may find its slot.
        written = min(row.length, len(row.tokens) - 1) if reason else row.length
        known = row.tokens[len(row.branch) : written]
        if known:
            self.trie.settle(row.branch, known)
        if reason is None and row in self._ending and not row.calls:
            reason = "length"
        if reason:
            self._end(row)
        return tuple(row.tokens[len(row.tokens) - count :]), reason

    def _single(self, row: _Row, steps: int) -> Run:
        """Plans a row's one outstanding token and those that it draws and brings in this call."""
        steps = min(steps, row.draws_left)
        room = self._reserve(row, max(1, steps))
        assert room, "pages were counted before"
        tokens = row.tokens[row.length :] or [-1]  # -1: the device knows it
        self.prefill_tokens_computed += row.length < len(row.request.prompt)
        return self._run(row, tokens, stored=0, steps=steps)

    def _chunk(self, row: _Row, budget: int) -> Run | None:
        """Plans the next tokens of a row that has many; None if it has to wait for pages."""
        tokens = row.tokens[row.length : row.length + budget]
        while True:
            try:
                # Tokens that the index happens to hold are computed again, for what follows them,
                # but not written again: their pages are others' too.
                stored = self.trie.extend(row.branch, tokens).matched
                break
            except OutOfPages:
                if not self._throw_out_after(row):
                    return None
        self.prefill_tokens_computed += len(tokens)
        ends = len(tokens) == row.outstanding
        return self._run(row, tokens, stored, steps=min(1, row.draws_left) if ends else 0)

    def _run(self, row: _Row, tokens: list[int], stored: int, steps: int) -> Run:
        targets = []
        if row.request.score_from is not None:
            # Hidden states from the one before the next token to score; the last has no target.
            first = max(row.scored, row.length + 1)
            targets = list(row.request.prompt[first : row.length + len(tokens) + 1])
            row.scored = first + len(targets)
            targets = [-1] * (first - row.length - 1) + targets if targets else []
        run = Run(row.seat, row.length, tokens, stored, row.branch.pages, steps, targets)
        row.length += len(tokens) + max(0, steps - 1)
        row.inflight += steps
        return run

    def _reserve(self, row: _Row, n: int) -> bool:
        """Room for a row's next n tokens; False if the row itself was thrown out for want of it."""
        while row.seat >= 0:
            try:
                self.trie.reserve(row.branch, row.length + n - len(row.branch))
                return True
            except OutOfPages:
                if not self._throw_out_after(row):
                    self._throw_out(row)
        return False

    def _steps(self, rows: list[_Row]) -> int:
        """How many steps the rows may take in one call."""
        if not rows:
            return 1
        left = [row.draws_left for row in rows]
        most = max(left)
        if self._waiting:  # a seat that becomes free should not have to wait long
            most = min(left)
            if any(row.request.stop_ids for row in rows):
                most = min(most, self.grid.decode_steps // 2)
        steps = self.grid.steps(most)
        size = self.grid.page_size
        new = (
            -(-(row.length + min(steps, n)) // size) - len(row.branch.pages)
            for row, n in zip(rows, left, strict=True)
        )
        return steps if sum(new) <= self.ledger.available else 1

    def _admit(self, row: _Row) -> bool:
        """Finds the pages that hold a request's beginning, if its other pages can be had."""
        if row.inflight:
            return False  # thrown out; its last tokens are on their way
        # The last token is computed in any case: its successor is what we are here for. To score
        # a token, the one before it is computed.
        end = len(row.tokens) - 1
        if row.request.score_from is not None and row.scored < len(row.request.prompt):
            end = min(end, row.scored - 1)
        self.trie.match(row.branch, row.tokens[:end])
        if self._need(row) > self.ledger.available:
            self.trie.release(row.branch)
            return False
        return True

    def _need(self, row: _Row) -> int:
        """Pages that must be there for a request to begin, those found excepted."""
        size = self.grid.page_size
        if self.optimistic:
            # A page for every other row, so that it is not thrown out in the next step.
            return -(-len(row.tokens) // size) - len(row.branch.pages) + len(self._rows)
        return row.future_pages(size) + self.promised_pages

    def _seat(self, row: _Row) -> Seat:
        row.length = len(row.branch)
        row.seat = self._free_seats.pop()
        self._rows.append(row)
        return Seat(
            row.seat, list(row.branch.pages), list(row.branch.tokens), row.length, row.request
        )

    def _pack(self, seats: list[Seat], runs: list[tuple[_Row, Run]], steps: int) -> Planned:
        drawing = [row.request for row, run in runs if run.draws]
        logprobs = any(request.logprobs for request in drawing)
        asks = logprobs or not all(request.greedy for request in drawing)
        runs = self._side_by_side(seats, runs)
        bucket, step = pack([run for _, run in runs], self.grid, steps, asks, self._tables)
        if self._tables is not None:
            row, entry, page = step.grow[:, step.grow[0] < self.grid.max_rows]
            self._tables[row, entry] = page
        step.logprobs[...] = logprobs
        entries, column, place = [], 0, 0
        for row, run in runs:
            scored = None
            if wanted := len(run.targets):
                blank = run.targets.count(-1)
                scored = (place + blank, place + wanted)
            entries.append(_Entry(row, run.draws, column, scored))
            row.calls += 1
            column += run.draws > 0
            place += len(run.tokens)
            if row.draws_left == 0 and row.length >= len(row.request.prompt):
                self._leave(row)
                self._ending.add(row)
        return Planned(tuple(seats), bucket, step, tuple(entries))

    def _side_by_side(
        self, seats: list[Seat], runs: list[tuple[_Row, Run]]
    ) -> list[tuple[_Row, Run]]:
        """Rows that share pages beside each other."""
        if self._tables is None:
            return runs
        for seat in seats:
            self._tables[seat.row, : len(seat.pages)] = seat.pages
        order = order_sharers(self._tables[[run.row for _, run in runs]])
        return [runs[i] for i in order]

    def _throw_out_after(self, row: _Row) -> bool:
        """Throws out the youngest row if it is younger than this one."""
        if not self.optimistic or self._rows[-1] is row:
            return False
        self._throw_out(self._rows[-1])
        return True

    def _throw_out(self, row: _Row) -> None:
        """Takes a row's pages and seat; it waits at the front and computes its tokens again."""
        self.trie.release(row.branch)
        self._leave(row)
        row.length = 0
        self._waiting.appendleft(row)
        self.preemptions += 1

    def _leave(self, row: _Row) -> None:
        self._rows.remove(row)
        self._free_seats.append(row.seat)
        row.seat = -1

    def _end(self, row: _Row) -> None:
        row.done = True
        del self._known[row.request.id]
        self.trie.release(row.branch)
        if row.seat >= 0:
            self._leave(row)
        elif row in self._ending:
            self._ending.remove(row)
        else:
            self._waiting.remove(row)
