"""First come, first served, with shared prefixes: the plainest planner.

Rows that decode go first, then the row whose prompt is unfinished, then new requests while tokens,
seats and pages last. A request is admitted only when the pages that it may ever need are there, so
nothing that has begun is ever thrown out. A prompt is admitted when the tokens before it are
planned, so a prefix that several prompts share is computed once and found by all the others.
"""

import dataclasses
from collections import deque
from collections.abc import Collection

import numpy as np

from kvjax.cache.ledger import PageLedger
from kvjax.cache.trie import Branch, PrefixTrie
from kvjax.plan.step import Bucket, Grid, Run, StepPlan, pack

__all__ = ["FirstCome", "Planned", "Request", "Sampled"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        id: names it in what the planner returns.
        prompt: token ids, at least one.
        max_tokens: at least 1; less if the row's pages end before.
        temperature: 0 takes the likeliest token.
        top_p: draws from the fewest tokens whose probabilities reach it.
        seed: of the draws, with the position: the same request draws the same tokens.
        stop_ids: tokens that end it.
    """

    id: int
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A token of a request; `finish_reason` is "stop" or "length" with the last one."""

    id: int
    token: int
    finish_reason: str | None


@dataclasses.dataclass(frozen=True)
class Planned:
    """A step, and the seats to give before it: (row, pages of its prefix, tokens in them)."""

    seats: tuple[tuple[int, list[int], int], ...]
    bucket: Bucket
    step: StepPlan[np.ndarray]


@dataclasses.dataclass(eq=False)
class _Row:
    request: Request
    seat: int
    branch: Branch
    most_pages: int
    generated: int = 0
    last_token: int = -1

    @property
    def prefilling(self) -> bool:
        return len(self.branch) < len(self.request.prompt)

    @property
    def future_pages(self) -> int:
        return self.most_pages - len(self.branch.pages)


class FirstCome:
    """Plans steps for the requests it has been given. `plan`, run it, `accept` what was sampled."""

    def __init__(self, grid: Grid, ledger: PageLedger) -> None:
        self.grid = grid
        self.ledger = ledger
        self.trie: PrefixTrie = PrefixTrie(ledger, grid.page_size)
        self.prefill_tokens_computed: int = 0
        self._waiting: deque[Request] = deque()
        self._rows: list[_Row] = []
        self._free_seats = list(range(grid.max_rows - 1, -1, -1))
        self._drawing: list[_Row] = []

    @property
    def capacity(self) -> int:
        """The most tokens that a row can hold, its last one excepted."""
        return min(self.grid.pages_per_row, self.ledger.num_pages) * self.grid.page_size

    @property
    def busy(self) -> bool:
        """Whether there is anything left to plan."""
        return bool(self._waiting or self._rows)

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
        self._waiting.append(request)

    def cancel(self, ids: Collection[int]) -> None:
        """Forgets requests, wherever they are, between an `accept` and the next `plan`."""
        self._waiting = deque(r for r in self._waiting if r.id not in ids)
        for row in [row for row in self._rows if row.request.id in ids]:
            self._leave(row)

    def plan(self) -> Planned:
        """The next step; `busy` must be true."""
        budget = self.grid.token_buckets[-1]
        runs, seats = [], []
        self._drawing = []
        for row in sorted(self._rows, key=lambda row: row.prefilling):
            if budget:
                budget -= self._run(row, budget, runs)
        while budget and self._waiting and self._free_seats:
            row = self._admit(self._waiting[0])
            if row is None:
                break
            self._waiting.popleft()
            seats.append((row.seat, list(row.branch.pages), len(row.branch)))
            budget -= self._run(row, budget, runs)
        bucket, step = pack(runs, self.grid)
        return Planned(tuple(seats), bucket, step)

    def accept(self, tokens: list[int]) -> list[Sampled]:
        """Takes the tokens that the planned step has sampled, in the plan's order."""
        sampled = []
        for row, token in zip(self._drawing, tokens, strict=False):
            row.generated += 1
            row.last_token = token
            reason = self._finish_reason(row, token)
            if reason is not None:
                self._leave(row)
            sampled.append(Sampled(row.request.id, token, reason))
        self._drawing = []
        return sampled

    def _run(self, row: _Row, budget: int, runs: list[Run]) -> int:
        """Plans the row's next tokens, at most `budget`; says how many."""
        request, start = row.request, len(row.branch)
        tokens = [row.last_token]
        if row.prefilling:
            tokens = list(request.prompt[start : start + budget])
            self.prefill_tokens_computed += len(tokens)
        # Tokens that the index happens to hold are computed again, for what follows them, but not
        # written again: their pages are others' too.
        stored = self.trie.extend(row.branch, tokens).matched
        draws = None
        if not row.prefilling:
            draws = (request.temperature, request.top_p, request.seed)
            self._drawing.append(row)
        if row.generated:
            tokens = [-1]  # the device has it
        runs.append(Run(row.seat, start, tokens, stored, row.branch.pages, draws))
        return len(tokens)

    def _admit(self, request: Request) -> _Row | None:
        """Seats a request on the pages that hold its beginning, if its other pages can be had."""
        size = self.grid.page_size
        most_tokens = min(len(request.prompt) + request.max_tokens - 1, self.capacity)
        branch = Branch()
        # The last token is computed in any case: its successor is what we are here for.
        self.trie.match(branch, request.prompt[:-1])
        row = _Row(request, -1, branch, -(-most_tokens // size))
        promised = sum(other.future_pages for other in self._rows)
        if row.future_pages + promised > self.ledger.available:
            self.trie.release(branch)
            return None
        row.seat = self._free_seats.pop()
        self._rows.append(row)
        return row

    def _finish_reason(self, row: _Row, token: int) -> str | None:
        if token in row.request.stop_ids:
            return "stop"
        full = len(row.branch) >= self.capacity
        return "length" if full or row.generated >= row.request.max_tokens else None

    def _leave(self, row: _Row) -> None:
        self.trie.release(row.branch)
        self._rows.remove(row)
        self._free_seats.append(row.seat)
