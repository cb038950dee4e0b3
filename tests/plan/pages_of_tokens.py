"""A stand-in for the device: its pages hold tokens, and it draws what it finds in them.

The next token of a row is a function of all the row's tokens, read through the table: a page that
is wrong, late, shared wrongly or given away too early changes what is drawn.
"""

import zlib
from collections import deque

import hypothesis.strategies as st
import numpy as np

from kvjax.plan import Request

VOCABULARY = 7


def requests_of_documents(most):
    """Up to so many requests whose prompts begin with parts of the same three documents."""
    parts = st.tuples(
        st.integers(0, 2),  # which document
        st.integers(0, 14),  # how much of it
        st.lists(st.integers(0, 3), min_size=1, max_size=6),  # the question
        st.integers(1, 12),
        st.sets(st.integers(0, VOCABULARY - 1), max_size=2),  # what ends it
        st.none() | st.integers(1, 6),  # what is scored
    )
    return st.lists(parts, min_size=1, max_size=most).map(_as_requests)


def _as_requests(specs):
    found = []
    for i, (document, part, question, max_tokens, stop, score) in enumerate(specs):
        prompt = (*range(100 * document + 1, 100 * document + 1 + part), *question)
        found.append(
            Request(
                id=i, prompt=prompt, max_tokens=max_tokens, stop_ids=frozenset(stop),
                score_from=score if score is None or score < len(prompt) else None,
            )
        )  # fmt: skip
    return found


def successor(tokens):
    return zlib.crc32(bytes(tokens)) % VOCABULARY


def rollout(prompt, n, stop_ids=()):
    """What a row must draw, whoever else is there."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + n:
        tokens.append(successor(tokens))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


class Device:
    """Does what `kvjax.infer.step` does, with tokens instead of keys and values."""

    def __init__(self, grid, num_pages):
        self.grid = grid
        self.pages = np.full((num_pages, grid.page_size), -1)
        self.table = np.full((grid.max_rows, grid.pages_per_row), -1)
        self.last = np.full(grid.max_rows, -1)
        self.stop = [()] * grid.max_rows
        self.ended = np.zeros(grid.max_rows, bool)  # what such rows still draw is worth nothing
        self.scored = set()  # (tokens before, target) pairs

    def __call__(self, planned):
        """Runs a call; int [S, B] as the step returns it."""
        for given in planned.seats:
            self.table[given.row] = -1
            self.table[given.row, : len(given.pages)] = given.pages
            self.stop[given.row] = given.request.stop_ids
            self.ended[given.row] = False
        plan = planned.step
        live = plan.grow[0] < self.grid.max_rows
        for row, entry, page in plan.grow[:, live].T:
            self.table[row, entry] = page
        drawn = np.full((planned.bucket.steps, len(plan.sample)), -1)
        going = plan.room > 0
        for i in range(planned.bucket.steps if self.grid.fixed else int(plan.steps)):
            if i and not going.any():
                break
            self._write(plan, i, going)
            for column in np.flatnonzero(going):
                row, place = plan.sample_row[column], plan.sample[column]
                tokens = [] if self.ended[row] else self._read(row, plan.position[place] + i + 1)
                token = successor(tokens)
                drawn[i, column] = self.last[row] = token
                self.ended[row] |= token in self.stop[row]
                going[column] = token not in self.stop[row] and i + 1 < plan.room[column]
        return drawn

    def _write(self, plan, i, going):
        places = plan.sample[going] if i else np.flatnonzero(plan.row < self.grid.max_rows)
        for place in places:
            row, position = plan.row[place], plan.position[place] + i
            token = self.last[row] if i or plan.token[place] < 0 else plan.token[place]
            page, offset = self.table[row, position // 4], position % 4
            assert page >= 0, "a token without a page"
            if plan.write[place]:
                self.pages[page, offset] = token
            else:
                assert self.pages[page, offset] == token, "what is said to be there is not"
            if plan.target[place] >= 0:
                self.scored.add((*self._read(row, position + 1), int(plan.target[place])))

    def _read(self, row, length):
        tokens = self.pages[self.table[row]].reshape(-1)[:length].tolist()
        assert min(tokens) >= 0, "a slot that nobody has written"
        return tokens


def drive(planner, device, ahead=1, on_step=lambda step: None):
    """Runs the planner dry with calls planned ahead; {id: (tokens, finish reason)}, calls made."""
    answers, running, calls = {}, deque(), 0
    while planner.busy or running:
        planned = planner.plan()
        if planned is not None:
            running.append((planned, device(planned)))
            calls += 1
        assert running, "nothing can be planned and nothing is running"
        if planned is None or len(running) > ahead:
            for news in planner.accept(*running.popleft()):
                tokens, reason = answers.setdefault(news.id, ([], None))
                assert reason is None, "news of a request that has ended"
                tokens.extend(news.tokens)
                answers[news.id] = (tokens, news.finish_reason)
        assert planner.ledger.held <= planner.ledger.num_pages
        on_step(calls)
        assert calls < 3000
    return answers, calls
