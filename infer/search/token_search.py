"""Search by tokens: beams of answers whose every next token is rated (Saffron-1, and its rivals).

A prompt's open answers are branches of one trie, whose pages hold the keys and values of every
model that is asked (arXiv 2506.06444, section 4.3). A step brings each open answer's last token to
the models, one row each; what goes on is forked by its table, and what does not gives its pages
back at once. What a prompt comes to does not depend on the prompts that are searched beside it.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Branch, KVPool, OutOfPages, PageLedger, PrefixTrie
from kvjax.errors import InputError
from kvjax.infer.search.ledger import Ledger
from kvjax.infer.search.token_models import Models, Programs, TokenOptions
from kvjax.infer.search.token_step import Rows

__all__ = ["Found", "Given", "TokenSearch"]

Given = Callable[[Sequence[tuple[int, tuple[int, ...]] | None]], np.ndarray]
"""Rewards float32[R, V] of rows, each the number of a prompt and its answer so far, or None."""


@dataclasses.dataclass
class _Open:
    """An answer on its way: the branch that holds it, and the rewards of its edges."""

    branch: Branch
    rewards: list[float]
    answer: tuple[int, ...] = ()
    ended: bool = False


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search came to for a prompt.

    Attributes:
        tokens: the answer, without its end token.
        score: the aggregate that it was chosen by.
        rewards: of its edges.
        ended: whether it ended by itself.
        others: how many it was chosen among, itself included.
    """

    tokens: tuple[int, ...]
    score: float
    rewards: tuple[float, ...]
    ended: bool
    others: int


class TokenSearch:
    """A search with fixed sizes: it compiles its programs at the first prompts, and never again.

    Args:
        models: see `Models`.
        options: see `TokenOptions`.
        prompts_at_a_time: B.
        prompt_tokens: the longest prompt.
        given: rewards to search by instead of a model's, such as an oracle's.
        num_pages: of the pools; None: enough for B prompts in any case.

    Raises:
        InputError: a model that the method asks is not there.
    """

    def __init__(
        self, models: Models, options: TokenOptions, *, prompts_at_a_time: int = 8,
        prompt_tokens: int = 64, given: Given | None = None, num_pages: int | None = None,
    ) -> None:  # fmt: skip
        b = prompts_at_a_time
        self.draws: int = options.width
        if options.method == "random":
            given = _noise(options.seed, models.policy[2].vocab_size)
        elif given is not None and options.method != "saffron":
            raise InputError(f"{options.method} searches by no given rewards: use saffron")
        if options.method == "rejection":  # one after the other
            options = dataclasses.replace(options, width=1)
        self.options: TokenOptions = options
        o = options
        behind = o.look_ahead * (o.method == "deal") + o.suffix
        longest = prompt_tokens + o.max_tokens + behind
        most = min(config.max_positions for config in models.configs.values())
        if longest > most:
            raise InputError(
                f"prompt, answer and what is behind it have up to {longest} tokens, the models "
                f"were made for {most}: make prompts or answers shorter"
            )
        self.models: Models = models
        self.given: Given | None = given
        self.size: tuple[int, int] = (b, prompt_tokens)
        self.pages_per_row: int = -(-longest // o.page_size)
        rows = b * o.width * (2 + 2 * o.children * o.by_prm) + 2 * b
        pages = num_pages or rows * self.pages_per_row
        self.programs: Programs = Programs(models, options, b, given is not None)
        self.pools: dict[str, KVPool] = self.programs.pools(pages, self.pages_per_row)
        self.params: dict[str, Any] = {name: models.params()[name] for name in self.pools}
        self.trie: PrefixTrie = PrefixTrie(PageLedger(pages), o.page_size)
        self.ledger: Ledger = Ledger()
        self._judged: list[Branch] = []

    def search(
        self, prompts: Sequence[Sequence[int]], *, first: int = 0,
        progress: Callable[[int, int], object] = lambda done, of: None,
    ) -> list[Found]:  # fmt: skip
        """Answers prompts; what it costs is added to `ledger`.

        Args:
            prompts: token ids.
            first: number of the first one, from which its draws follow.
            progress: is told how many are done.

        Raises:
            InputError: a prompt is empty or too long, or has ids that the models do not know.
        """
        start, found = time.perf_counter(), []
        for number, prompt in enumerate(prompts):
            self._check(number, prompt)
        for at in range(0, len(prompts), self.size[0]):
            group = [tuple(map(int, prompt)) for prompt in prompts[at : at + self.size[0]]]
            numbers = [first + at + i for i in range(len(group))]
            if self.options.method == "rejection":
                found += self._reject(group, numbers)
            else:
                answers = self._group(group, numbers, self.options.seed)
                found += self._choose(group, answers)
            progress(len(found), len(prompts))
        self.ledger.seconds += time.perf_counter() - start
        return found

    def _check(self, number: int, prompt: Sequence[int]) -> None:
        vocab = self.models.policy[2].vocab_size
        if not 0 < len(prompt) <= self.size[1]:
            raise InputError(f"prompt {number} has {len(prompt)} tokens: give 1 to {self.size[1]}")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise InputError(f"prompt {number} has ids outside of the vocabulary of {vocab}")

    def _group(
        self, prompts: list[tuple[int, ...]], numbers: list[int], seed: int
    ) -> list[list[_Open]]:
        """The answers of B prompts or fewer, at most N of each."""
        o = self.options
        nodes = [[_Open(self._grow(Branch(), prompt), [])] for prompt in prompts]
        done: list[list[_Open]] = [[] for _ in prompts]
        if o.by_prm:  # later tokens it sees as children
            self._bring_prompts([of[0].branch for of in nodes], prompts)
        for step in range(o.max_tokens):
            if not any(nodes):
                break
            edges = self._edges(nodes, numbers, seed, step)
            following: list[list[_Open]] = [[] for _ in prompts]
            for b, of_prompt in enumerate(edges):
                for node, token, reward in of_prompt[: o.width - len(done[b])]:
                    child = self._child(nodes[b][node], token, reward)
                    (done if child.ended else following)[b].append(child)
            self._hold()
            self._release([*self._judged, *(node.branch for of in nodes for node in of)])
            nodes, self._judged = following, []
        self._release(node.branch for of in nodes for node in of)
        return [a + b for a, b in zip(done, nodes, strict=True)]

    def _child(self, parent: _Open, token: int, reward: float) -> _Open:
        """The answer with one token more; one that ends needs no pages any longer."""
        rewards = [*parent.rewards, reward]
        if token in self.models.ends:
            return _Open(Branch(), rewards, parent.answer, ended=True)
        return _Open(self._grow(parent.branch, (token,)), rewards, (*parent.answer, token))

    def _edges(
        self, nodes: list[list[_Open]], numbers: list[int], seed: int, step: int
    ) -> list[list[tuple[int, int, float]]]:
        """The edges of each prompt that go on, best first: node, token, reward."""
        b, width = self.size[0], 1 if step == 0 else self.options.width
        grid = [of[i] if i < len(of) else None for of in nodes for i in range(width)]
        grid += [None] * (b * width - len(grid))
        counts = [0 if n is None else len(n.branch) if step == 0 else 1 for n in grid]
        rows = self._rows([n and n.branch for n in grid], counts, self.size[1] if step == 0 else 1)
        may_end = jnp.asarray(step >= self.options.min_tokens)
        if self.options.by_prm:
            return self._children(nodes, rows, width, may_end)
        own = np.array([n.rewards[-1] if n and n.rewards else 0.0 for n in grid], np.float32)
        given = None
        if self.given is not None:
            at = [n and (numbers[i // width], n.answer) for i, n in enumerate(grid)]
            given = jnp.asarray(self.given(at), jnp.float32)
        keys = _keys(seed, jnp.asarray([*numbers, *([0] * (b - len(numbers)))]), step)
        for name in self.pools.keys() & {"policy", "mrm"}:
            self._count(name, rows, self.models.policy[2].vocab_size)
        self.pools, found = self.programs.expand(
            self.params, self.pools, rows, jnp.asarray(own.reshape(b, width)), keys, may_end, given
        )
        score, reward, node, token = map(np.asarray, found[:4])
        return [
            [(int(node[p, i]), int(token[p, i]), float(reward[p, i]))
             for i in np.flatnonzero(score[p] > -np.inf)]
            for p in range(len(nodes))
        ]  # fmt: skip

    def _children(
        self, nodes: list[list[_Open]], rows: Rows, width: int, may_end: jax.Array
    ) -> list[list[tuple[int, int, float]]]:
        """The same, each node's K likeliest children judged one by one by the PRM."""
        o = self.options
        score, token, logprob = self._top(rows, o.children, may_end)
        edges: list[list[tuple[float, int, int, float]]] = [[] for _ in nodes]
        asked: list[tuple[int, int, int, float]] = []
        branches: list[Branch] = []
        for row, k in np.argwhere(score > -np.inf):
            (b, node), child, likely = divmod(row, width), int(token[row, k]), logprob[row, k]
            parent = nodes[b][node]
            if child in self.models.ends:
                own = parent.rewards[-1] if parent.rewards else 0.0
                edges[b].append((own + o.mix * float(likely), int(node), child, own))
                continue
            asked.append((b, int(node), child, float(likely)))
            branches.append(self._grow(parent.branch, (child,)))
        rewards = self._judge_children(branches, self.size[0] * width * o.children)
        for (b, node, child, likely), reward in zip(asked, rewards, strict=True):
            edges[b].append((float(reward) + o.mix * likely, node, child, float(reward)))
        self._judged = branches  # held, so that those that go on find their pages again
        ranked = [sorted(of, key=lambda e: (-e[0], e[1], e[2]))[: o.width] for of in edges]
        return [[edge[1:] for edge in of] for of in ranked]

    def _top(
        self, rows: Rows, width: int, may_end: jax.Array
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each row's likeliest tokens: score, which is -inf where there is none, ids, logprobs."""
        self._count("policy", rows, self.models.policy[2].vocab_size)
        self.pools, found = self.programs.top(self.params, self.pools, rows, width, may_end)
        return np.asarray(found.score), np.asarray(found.token), np.asarray(found.logprob)

    def _judge_children(self, branches: list[Branch], most: int) -> np.ndarray:
        """The PRM's rewards of children, or of what they greedily lead to."""
        ahead = self.options.look_ahead if self.options.method == "deal" else 0
        ends = [self.trie.fork(branch) for branch in branches]
        for _ in range(ahead):
            rows = self._rows(self._padded(ends, most), [1] * len(ends), 1)
            _, token, _ = self._top(rows, 1, jnp.asarray(False))
            for branch, following in zip(ends, token[:, 0].tolist(), strict=False):
                self._extend(branch, (following,))
        scores = self._judge(ends, [1 + ahead] * len(ends), 1 + ahead, most)
        self._release(ends)
        return scores

    def _judge(self, branches: list[Branch], counts: list[int], room: int, most: int) -> np.ndarray:
        """The PRM's rewards of texts, of which it has not seen so many last tokens.

        What it wants behind a text is appended to the branches, and computed with it.
        """
        suffix = self.options.suffix
        if suffix:
            for branch in branches:
                self._extend(branch, (0,) * suffix)
        self._hold()
        counts = [count + suffix for count in counts]
        rows = self._rows(self._padded(branches, most), counts, room + suffix)
        return self._ask(rows, suffix)[: len(branches)]

    def _bring_prompts(self, branches: list[Branch], prompts: list[tuple[int, ...]]) -> None:
        counts, b = [len(prompt) for prompt in prompts], self.size[0]
        self._ask(self._rows(self._padded(branches, b), counts, self.size[1]), 0)

    def _ask(self, rows: Rows, suffix: int) -> np.ndarray:
        place = jnp.asarray(np.maximum(rows.count - 1 - suffix, 0))
        self._count("prm", rows, 1)
        self.pools, score = self.programs.score(self.params, self.pools, rows, place)
        return np.asarray(score)

    def _choose(self, prompts: list[tuple[int, ...]], answers: list[list[_Open]]) -> list[Found]:
        """The best answer of each prompt, by the declared aggregate."""
        o = self.options
        if o.judges_whole:
            scores = self._whole(prompts, answers)
        else:
            scores = [[_AGGREGATE[o.aggregate](a.rewards) for a in of] for of in answers]
        found = []
        for of, each in zip(answers, scores, strict=True):
            best = of[at := int(np.argmax(each))]
            found.append(Found(best.answer, each[at], tuple(best.rewards), best.ended, len(of)))
        return found

    def _whole(
        self, prompts: list[tuple[int, ...]], answers: list[list[_Open]]
    ) -> list[list[float]]:
        """The PRM's rewards of whole answers; a prompt is brought once for all of its own."""
        roots = [self._grow(Branch(), prompt) for prompt in prompts]
        self._bring_prompts(roots, prompts)
        flat = [(b, answer.answer) for b, of in enumerate(answers) for answer in of]
        # An empty answer is judged by the prompt's last token.
        branches = [self._grow(roots[b], answer) for b, answer in flat]
        counts = [max(1, len(answer)) for _, answer in flat]
        most = self.size[0] * self.options.width
        scores = iter(self._judge(branches, counts, self.options.max_tokens, most).tolist())
        self._release([*branches, *roots])
        return [[next(scores) for _ in of] for of in answers]

    def _reject(self, prompts: list[tuple[int, ...]], numbers: list[int]) -> list[Found]:
        """Draws answers until the PRM takes one; else the best of them."""
        found: dict[int, Found] = {}
        waiting = list(range(len(prompts)))
        for draw in range(self.draws):
            if not waiting:
                break
            some = [prompts[i] for i in waiting]
            seed = self.options.seed + draw * _NEXT_DRAW
            answers = self._group(some, [numbers[i] for i in waiting], seed)
            for i, each in zip(waiting, self._choose(some, answers), strict=True):
                best = each if i not in found or each.score > found[i].score else found[i]
                found[i] = dataclasses.replace(best, others=draw + 1)
            waiting = [i for i in waiting if found[i].score < self.options.threshold]
        return [found[i] for i in range(len(prompts))]

    def _grow(self, branch: Branch, tokens: Sequence[int]) -> Branch:
        """A new branch: this one, and tokens after it."""
        child = self.trie.fork(branch)
        self._extend(child, tokens)
        return child

    def _extend(self, branch: Branch, tokens: Sequence[int]) -> None:
        try:
            copies = self.trie.extend(branch, tokens).copies
        except OutOfPages as e:
            raise InputError(f"{e}; or search fewer prompts at a time, or less wide") from e
        for source, target in copies:  # with one token a page there are none
            pair = (jnp.asarray([page], jnp.int32) for page in (source, target))
            self.pools = self.programs.copy(self.pools, *pair)

    def _release(self, branches: Iterable[Branch]) -> None:
        for branch in branches:
            self.trie.release(branch)

    def _padded(self, branches: Sequence[Branch], most: int) -> list[Branch | None]:
        return [*branches, *([None] * (most - len(branches)))]

    def _rows(self, branches: Sequence[Branch | None], counts: Sequence[int], room: int) -> Rows:
        """Rows that bring so many last tokens of their branches, at most `room` each."""
        r = len(branches)
        rows = Rows(
            np.zeros((r, room), np.int32), np.zeros(r, np.int32), np.zeros(r, np.int32),
            np.full((r, self.pages_per_row), self.trie.ledger.num_pages, np.int32),
        )  # fmt: skip
        for i, branch in enumerate(branches):
            if branch is not None:
                count = counts[i]
                rows.tokens[i, :count] = branch.tokens[len(branch) - count :]
                rows.count[i], rows.length[i] = count, len(branch) - count
                rows.pages[i, : len(branch.pages)] = branch.pages
        return rows

    def _count(self, name: str, rows: Rows, outputs: int) -> None:
        self.ledger.add(name, self.models.configs[name], rows.count, rows.length, outputs)

    def _hold(self) -> None:
        """Notes what the cache holds now."""
        pages = self.trie.ledger.held
        for name in self.pools:
            config = self.programs.cache_config(name, 1, 1)
            self.ledger.hold(name, pages * config.page_bytes(jax.default_backend()))


_NEXT_DRAW = 7919
_AGGREGATE: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda rewards: float(rewards[-1]),
    "min": lambda rewards: float(min(rewards)),
    "mean": lambda rewards: float(np.mean(rewards)),
}


@jax.jit
def _keys(seed: int, numbers: jax.Array, step: int) -> jax.Array:
    """A key for each prompt and step, which no other prompt has a part in."""
    key = jax.random.key(seed)
    return jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n), step))(numbers)


def _noise(seed: int, vocab_size: int) -> Given:
    """Rewards that say nothing: normal noise by prompt and answer."""

    def noise(at: Sequence[tuple[int, tuple[int, ...]] | None]) -> np.ndarray:
        out = np.zeros((len(at), vocab_size), np.float32)
        for row, where in enumerate(at):
            if where is not None:
                number, answer = where
                rng = np.random.default_rng((seed, number, *answer))
                out[row] = rng.normal(size=vocab_size)
        return out

    return noise
