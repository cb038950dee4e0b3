"""Rows of the engine for a search: steps to draw, beginnings to judge, and pages that are held.

A path of the tree is a sequence like any other. What it shares with other paths are pages, which
the engine's trie finds by their tokens; between levels the search holds those of the live paths,
and what it no longer holds is free at once.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from kvjax.cache import Branch, OutOfPages
from kvjax.errors import InputError
from kvjax.infer.engine import Engine, Output
from kvjax.infer.llm import LLM
from kvjax.infer.prefix import check_idle
from kvjax.infer.sampling import MAX_STOP_IDS, SamplingParams
from kvjax.infer.search.tree import Node
from kvjax.models.reward import TokenReward, ValueReward
from kvjax.plan import Request

__all__ = [
    "Draw", "Drawn", "Held", "Reward", "StepEnds", "chat_turns", "draw_steps", "judge",
    "step_ends", "tags_between",
]  # fmt: skip


class Held:
    """The pages of sequences that must stay: those that are full, each once however many share it.

    The engine may run meanwhile, if `hold` is called as soon as a sequence's request has ended.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._branches: dict[Hashable, Branch] = {}

    def hold(self, name: Hashable, tokens: Sequence[int]) -> None:
        """Holds the pages of a sequence as far as they are in the cache."""
        trie, branch = self.engine.planner.trie, self._branches.setdefault(name, Branch())
        if tuple(tokens[: len(branch)]) != tuple(branch.tokens):
            raise ValueError(f"{name!r} names another sequence")
        trie.match(branch, tokens[len(branch) :])

    def release(self, names: Iterable[Hashable]) -> None:
        """Gives up the pages of these sequences that no other holds."""
        for name in names:
            branch = self._branches.pop(name, None)
            if branch is not None:
                self.engine.planner.trie.release(branch)

    def close(self) -> None:
        """Gives up everything."""
        self.release(list(self._branches))

    @property
    def pages(self) -> int:
        """Different pages that are held."""
        return len({page for branch in self._branches.values() for page in branch.pages})


@dataclasses.dataclass(frozen=True)
class StepEnds:
    """Which tokens end a step, and which of them end the solution.

    Attributes:
        step: tokens whose text ends with what ends a step.
        solution: the model's end tokens; they are no part of a step.
    """

    step: frozenset[int]
    solution: frozenset[int]

    @functools.cached_property
    def on_device(self) -> frozenset[int]:
        """Those that the engine is told. If there are too many it stops late, and we cut."""
        both = self.step | self.solution
        return both if len(both) <= MAX_STOP_IDS else self.solution

    def cut(self, tokens: Sequence[int]) -> int | None:
        """How many of the tokens are the step, if it ends among them."""
        found = (i + 1 for i, t in enumerate(tokens) if t in self.step or t in self.solution)
        return next(found, None)


def step_ends(llm: LLM, texts: Sequence[str]) -> StepEnds:
    """The tokens that end a step: those whose text ends with one of `texts`.

    Raises:
        InputError: the model has no tokenizer, or no such token.
    """
    if llm.tokenizer is None:
        raise InputError("the model's folder has no tokenizer.json: a search needs to know steps")
    backend = llm.tokenizer.backend
    texts = tuple(texts)
    ids = range(backend.get_vocab_size())
    pieces = backend.decode_batch([[i] for i in ids], skip_special_tokens=True)
    found = frozenset(i for i, piece in zip(ids, pieces, strict=True) if piece.endswith(texts))
    if not found:
        raise InputError(f"no token of the model ends with {' or '.join(map(repr, texts))}")
    return StepEnds(found, llm.eos_ids)


@dataclasses.dataclass(frozen=True)
class Draw:
    """A step to draw.

    Attributes:
        name: of the sequence it makes, for `Held`.
        prompt: what it follows.
        seed: of the draws.
        most: tokens.
    """

    name: tuple[int, tuple[int, ...]]
    prompt: tuple[int, ...]
    seed: int
    most: int


@dataclasses.dataclass
class Drawn:
    """A step that was drawn; `ended` says whether the model ended the solution with it."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False
    done: bool = False


def draw_steps(
    llm: LLM, held: Held, draws: Sequence[Draw], ends: StepEnds, sampling: SamplingParams
) -> list[Drawn]:
    """Draws steps, many at a time, and holds the pages of what they make."""
    planner, drawn = llm.engine.planner, [Drawn() for _ in draws]
    for number, draw in enumerate(draws):
        own = dataclasses.replace(sampling, seed=draw.seed)
        planner.add(
            Request(
                id=number, prompt=draw.prompt, max_tokens=draw.most, stop_ids=ends.on_device,
                greedy=own.is_greedy, sampling=own,
            )
        )  # fmt: skip
    for output in _run(llm.engine, range(len(draws))):
        draw, row = draws[output.id], drawn[output.id]
        if row.done:
            continue
        row.tokens += output.tokens
        cut = ends.cut(row.tokens)
        row.done = cut is not None or output.finish_reason is not None
        if row.done:
            if output.finish_reason is None:
                planner.cancel([output.id])  # it ended with a token that the engine does not know
            if cut is not None:  # else it has all the tokens that it may have
                del row.tokens[cut:]
            if row.tokens and row.tokens[-1] in ends.solution:
                row.tokens.pop()
                row.ended = True
            held.hold(draw.name, (*draw.prompt, *row.tokens))
    return drawn


def _run(engine: Engine, ids: Iterable[int]) -> Iterable[Output]:
    ids = list(ids)
    try:
        yield from itertools.chain.from_iterable(engine.run())
    except OutOfPages as e:
        raise InputError(f"{e}; or search fewer questions at a time, or less wide") from e
    finally:
        engine.planner.cancel(ids)


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward model behind an engine.

    Attributes:
        llm: whose tokenizer must be the policy's; the policy itself, if it judges its own steps.
        head: how it says its judgement.
        render: the tokens that stand for a node and those before it, where they are not the
            policy's own: `tags_between` and `chat_turns` make such.
    """

    llm: LLM
    head: TokenReward | ValueReward
    render: Callable[[Node], tuple[int, ...]] = Node.sequence

    def targets(self) -> tuple[int, ...]:
        """Tokens whose log-probabilities `head.reward` takes."""
        return (self.head.good, self.head.bad) if isinstance(self.head, TokenReward) else (0,)


def tags_between(tag: Sequence[int]) -> Callable[[Node], tuple[int, ...]]:
    """For models that saw a tag after every step, as Math-Shepherd's did: `tag` is its `ask`."""

    def render(node: Node) -> tuple[int, ...]:
        root, *steps = node.lineage()
        before = (token for step in steps[:-1] for token in (*step.tokens, *tag))
        return (*root.tokens, *before, *(steps[-1].tokens if steps else ()))

    return render


def chat_turns(llm: LLM, good: str = "+") -> Callable[[Node], tuple[int, ...]]:
    """For models that answer every step as a chat's turn, as RLHFlow's do.

    The first user's turn is the question and the first step. Steps before were found good.
    """
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise InputError("the reward model's folder has no tokenizer.json: it judges by chat")

    def render(node: Node) -> tuple[int, ...]:
        question, (first, *others) = node.lineage()[0].text, node.steps() or [""]
        chat = [{"role": "user", "content": f"{question} {first.strip()}"}]
        for step in others:
            chat.append({"role": "assistant", "content": good})
            chat.append({"role": "user", "content": step.strip()})
        return tuple(tokenizer.encode_chat(chat))

    return render


def judge(
    reward: Reward, held: Held, names: Sequence[Hashable], sequences: Sequence[tuple[int, ...]]
) -> list[float]:
    """Rewards of beginnings, many at a time; their pages are held in the reward model's cache.

    Args:
        reward: the model.
        held: of its engine.
        names: of the sequences.
        sequences: the prompt and the steps up to one's end.
    """
    check_idle(reward.llm.engine)
    targets = reward.targets()
    found = np.full((len(sequences), len(targets)), np.nan)
    _ask(reward, held, names, sequences, found, 0)
    for column in range(1, len(targets)):
        _ask(reward, held, names, sequences, found, column)
    return [reward.head.reward(*row) for row in found.tolist()]


def _ask(
    reward: Reward, held: Held, names: Sequence[Hashable], sequences: Sequence[tuple[int, ...]],
    found: np.ndarray, column: int,
) -> None:  # fmt: skip
    """Fills a column of log-probabilities, and of others what came with it."""
    engine, targets = reward.llm.engine, reward.targets()
    asked = [i for i in range(len(sequences)) if np.isnan(found[i, column])]
    for i in asked:
        path = (*sequences[i], *reward.head.ask)
        engine.planner.add(
            Request(
                id=i, prompt=(*path, targets[column]), max_tokens=0, score_from=len(path),
                sampling=SamplingParams(max_tokens=0, prompt_logprobs=0),
            )
        )  # fmt: skip
    for output in _run(engine, asked):
        if output.scores is not None and len(output.scores.chosen):
            found[output.id, column] = output.scores.chosen[-1]
            likely = output.scores.top_token[-1].tolist()
            top = dict(zip(likely, output.scores.top[-1].tolist(), strict=True))
            for other, target in enumerate(targets):
                if target in top:
                    found[output.id, other] = top[target]
        if output.finish_reason is not None:
            held.hold(names[output.id], sequences[output.id])
