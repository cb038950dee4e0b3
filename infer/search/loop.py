"""The search: one loop for all policies, a level of every question's tree at a time.

A level is drawn, judged and dealt out: the leaves' next steps are rows of the engine, those of all
questions together; the reward model judges what came; the policy says what goes on. A leaf that
does not gives its pages back before the next level is drawn. A question's tree does not depend on
the other questions: what a node draws follows from its place in its own tree.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import jax

from kvjax.infer.llm import LLM, Prompt
from kvjax.infer.sampling import SamplingParams
from kvjax.infer.search.policies import Frontier, Policy
from kvjax.infer.search.rows import Draw, Held, Reward, StepEnds, draw_steps, judge, step_ends
from kvjax.infer.search.tree import KVSizes, Node, fold_seed, kv_sizes

__all__ = ["Cost", "Level", "SearchParams", "Searched", "search"]

Finished = Callable[[Prompt, str], bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchParams:
    """How to search.

    Attributes:
        width: continuations of a level in all, while no leaf has ended.
        step_ends: texts that end a step.
        step_tokens: the most of a step.
        max_tokens: of a solution; longer ones are given up.
        max_levels: after which a search ends.
        sampling: how steps are drawn; its seed and its limits are not looked at.
        seed: of the whole search.
        merge: whether equal siblings become one node that stands for several. It changes no
            distribution, and saves judging and cache.
        finished: whether a solution ends with what was written, beside ending with an end token:
            `(question, text) -> bool`.
    """

    width: int = 16
    step_ends: tuple[str, ...] = ("\n\n",)
    step_tokens: int = 256
    max_tokens: int = 1024
    max_levels: int = 25
    sampling: SamplingParams = dataclasses.field(
        default_factory=lambda: SamplingParams(temperature=1.0)
    )
    seed: int = 0
    merge: bool = True
    finished: Finished = lambda question, text: False


@dataclasses.dataclass(frozen=True)
class Level:
    """What was measured at a level of one tree, when the policy had decided.

    Attributes:
        leaves: candidates, equal ones counted each.
        kept: that the policy chose.
        continued: that got continuations.
        before: tokens of all candidates and what is above them.
        after: tokens of the continued ones and what is above them.
    """

    leaves: int
    kept: int
    continued: int
    before: KVSizes
    after: KVSizes


@dataclasses.dataclass
class Searched:
    """A question's tree, and what it took.

    Attributes:
        question: as given.
        root: of the tree.
        levels: from the first steps on.
        ended: leaves that are solutions.
        tokens: drawn.
        calls: steps drawn, one for each continuation.
        judged: nodes.
    """

    question: Prompt
    root: Node
    levels: list[Level] = dataclasses.field(default_factory=list)
    ended: list[Node] = dataclasses.field(default_factory=list)
    lost: int = 0
    tokens: int = 0
    calls: int = 0
    judged: int = 0
    leaves: list[Node] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Cost:
    """What a search of several questions took together.

    Attributes:
        policy_seconds, reward_seconds, select_seconds: of drawing, judging and deciding.
        pages_before: pages held before each level's decision, `pages_after`: after it.
        pages_peak: the most pages that anybody held at a time.
        page_bytes: of one page of the policy's cache.
    """

    policy_seconds: float = 0.0
    reward_seconds: float = 0.0
    select_seconds: float = 0.0
    pages_before: list[int] = dataclasses.field(default_factory=list)
    pages_after: list[int] = dataclasses.field(default_factory=list)
    pages_peak: int = 0
    page_bytes: int = 0


def search(
    llm: LLM,
    questions: Sequence[Prompt],
    policy: Policy,
    reward: Reward,
    params: SearchParams,
    *,
    first: int = 0,
    on_level: Callable[[int, Held], None] = lambda level, held: None,
) -> tuple[list[Searched], Cost]:
    """Searches for solutions of questions, all at a time.

    Args:
        llm: draws steps. Its engine must be idle.
        questions: text, token ids or chat messages.
        policy: deals out the width.
        reward: judges beginnings. If its model is `llm` itself, the two share one cache.
        params: how.
        first: number of the first question, which its seeds are made of.
        on_level: is called when a level's pages have been given back, with its number.

    Returns:
        A tree for each question, and what it all took.

    Raises:
        InputError: a question cannot be answered, or the cache is too small for the search.
    """
    ends = step_ends(llm, params.step_ends)
    planner = llm.engine.planner
    start = planner.ledger.held
    planner.ledger.peak = start
    cost = Cost(page_bytes=llm.engine.cache.page_bytes(jax.default_backend()))
    trees = [Searched(q, Node(None, llm.check(q), question_text(q))) for q in questions]
    for tree in trees:
        tree.leaves = [tree.root]
    own = Held(llm.engine)
    theirs = own if reward.llm is llm else Held(reward.llm.engine)
    try:
        for level in range(params.max_levels):
            clock = time.perf_counter()
            cost.pages_before.append(planner.ledger.held - start)
            draws = _decide(llm, trees, policy, reward, params, own, theirs, level, first)
            cost.pages_after.append(planner.ledger.held - start)
            cost.select_seconds += time.perf_counter() - clock
            on_level(level, own)
            if not draws:
                break
            _draw(llm, trees, own, theirs, draws, ends, params, cost)
            _judge(trees, reward, own, theirs, params, cost)
        cost.pages_peak = planner.ledger.peak - start
    finally:
        own.close()
        theirs.close()
    for tree in trees:
        for leaf in tree.leaves:  # the last level's
            leaf.fate = leaf.fate or "too many levels"
    return trees, cost


def question_text(question: Prompt) -> str:
    """What was asked, in words; "" where there are only token ids."""
    if isinstance(question, str):
        return question
    last = question[-1] if len(question) else ""
    return str(last["content"]) if isinstance(last, Mapping) else ""


def _decide(
    llm: LLM, trees: list[Searched], policy: Policy, reward: Reward, params: SearchParams,
    own: Held, theirs: Held, level: int, first: int,
) -> list[tuple[int, Node, Draw]]:  # fmt: skip
    """Asks the policy of each tree, gives back what is given up, and says what to draw."""
    draws: list[tuple[int, Node, Draw]] = []
    for number, tree in enumerate(trees):
        width = params.width - sum(leaf.count for leaf in tree.ended) - tree.lost
        if not tree.leaves or width <= 0:
            for leaf in tree.leaves:
                leaf.fate = "no width left"
            _release(own, theirs, number, tree.leaves)
            tree.leaves = []
            continue
        frontier = Frontier(
            leaves=tree.leaves, width=width, full_width=params.width, ended=tree.ended,
            page_size=llm.engine.grid.page_size,
        )  # fmt: skip
        decided = policy.allocate(frontier)
        going = []
        for leaf, count, fate in zip(tree.leaves, decided.counts, decided.fates, strict=True):
            leaf.width, leaf.fate = int(count), fate
            if count:
                going.append(leaf)
        if level:
            tree.levels.append(_measured(tree.leaves, going, decided.kept))
        _release(own, theirs, number, [leaf for leaf in tree.leaves if not leaf.width])
        tree.leaves = going
        for leaf in going:
            prompt = leaf.sequence()
            written = len(prompt) - len(tree.root.tokens)
            left = min(params.max_tokens, _room(reward, tree)) - written
            for child in range(leaf.width):
                path = (*leaf.path, child)
                seed = fold_seed(params.seed, first + number, path)
                name = (number, path)
                most = max(1, min(left, params.step_tokens))
                draws.append((number, leaf, Draw(name, prompt, seed, most)))
    return draws


def _measured(leaves: Sequence[Node], going: Sequence[Node], kept: int) -> Level:
    after = [dataclasses.replace(leaf, count=1) for leaf in going]
    return Level(
        sum(leaf.count for leaf in leaves), kept, len(going), kv_sizes(leaves), kv_sizes(after)
    )


def _release(own: Held, theirs: Held, number: int, leaves: Sequence[Node]) -> None:
    names = [(number, leaf.path) for leaf in leaves]
    own.release(names)
    if theirs is not own:
        theirs.release(names)


def _draw(
    llm: LLM, trees: list[Searched], own: Held, theirs: Held,
    draws: list[tuple[int, Node, Draw]], ends: StepEnds, params: SearchParams, cost: Cost,
) -> None:  # fmt: skip
    """Draws the next level's steps and puts them into the trees."""
    clock = time.perf_counter()
    drawn = draw_steps(llm, own, [draw for _, _, draw in draws], ends, params.sampling)
    cost.policy_seconds += time.perf_counter() - clock
    for number, tree in enumerate(trees):
        _release(own, theirs, number, tree.leaves)  # what goes on is held by what came of it
        tree.leaves = []
    merged: dict[tuple[int, int, tuple[int, ...], bool], Node] = {}
    for (number, leaf, draw), step in zip(draws, drawn, strict=True):
        tree, tokens = trees[number], tuple(step.tokens)
        tree.tokens += len(tokens) + step.ended
        tree.calls += 1
        key = (number, id(leaf), tokens, step.ended)
        if params.merge and key in merged:
            merged[key].count += 1
            own.release([draw.name])
            continue
        node = Node(leaf, tokens, _text(llm, leaf, tokens), draw.name[1], finished=step.ended)
        merged[key] = node
        leaf.children.append(node)
        tree.leaves.append(node)


def _text(llm: LLM, leaf: Node, tokens: tuple[int, ...]) -> str:
    """A step's text, decoded with what is before it: a letter's bytes may be in both."""
    assert llm.tokenizer is not None
    before = [token for node in leaf.lineage()[1:] for token in node.tokens]
    whole = llm.tokenizer.decode([*before, *tokens])
    return whole[len(llm.tokenizer.decode(before)) :]


def _judge(
    trees: list[Searched], reward: Reward, own: Held, theirs: Held, params: SearchParams,
    cost: Cost,
) -> None:  # fmt: skip
    """Judges the new leaves, and sets those aside that have ended."""
    clock = time.perf_counter()
    named = [(number, leaf) for number, tree in enumerate(trees) for leaf in tree.leaves]
    sequences = [reward.render(leaf) for _, leaf in named]
    scores = judge(reward, theirs, [(n, leaf.path) for n, leaf in named], sequences)
    for (number, leaf), score in zip(named, scores, strict=True):
        leaf.score = score
        trees[number].judged += 1
    cost.reward_seconds += time.perf_counter() - clock
    for number, tree in enumerate(trees):
        going = []
        for leaf in tree.leaves:
            length = len(leaf.sequence()) - len(tree.root.tokens)
            full = length >= min(params.max_tokens, _room(reward, tree))
            leaf.finished = leaf.finished or params.finished(tree.question, leaf.answer())
            if leaf.finished or full:
                leaf.fate = "finished" if leaf.finished else "too long"
                _release(own, theirs, number, [leaf])
                tree.lost += leaf.count * (not leaf.finished)
                if leaf.finished:
                    tree.ended.append(leaf)
            else:
                going.append(leaf)
        tree.leaves = going


def _room(reward: Reward, tree: Searched) -> int:
    """Tokens of a solution that the cache can hold, with a question behind it."""
    held = reward.llm.engine.planner.capacity - len(reward.head.ask) - 2
    return held - len(tree.root.tokens)
