"""What an evaluation is made of: prompts, and a suite that says which, under which policies."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator

import numpy as np

from kvjax.errors import InputError
from kvjax.models.tokenizer import Tokenizer

__all__ = ["PROTOCOLS", "TAGS", "Prompt", "Suite", "read_suite", "split_chat"]

PROTOCOLS = ("A", "B")
TAGS = ("true", "wrong", "none", "classifier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A context, a question about it, and what answers it.

    Attributes:
        name: its own among those of its task and length.
        task: what kind it is of.
        length: tokens that it was made to fill; results are shown by it.
        context: int32[n], what may be compressed before the question is known.
        question: int32[m], what follows, up to where the answer begins.
        answers: texts that are right.
        metric: how an answer is scored, a name of `kvjax.infer.evaluate_metrics`.
        gathers: whether the answer has to be gathered from everywhere (aggregation).
        needles: (start, end) of tokens in the context that the answer needs; empty: not known.
        most_tokens: of an answer; 0: as many as the longest right one has.
    """

    name: str
    task: str
    length: int
    context: np.ndarray
    question: np.ndarray
    answers: tuple[str, ...]
    metric: str = "exact"
    gathers: bool = False
    needles: tuple[tuple[int, int], ...] = ()
    most_tokens: int = 0

    @property
    def depth(self) -> float | None:
        """Where in the context the first needle begins, from 0 to 1."""
        if not self.needles:
            return None
        return min(start for start, _ in self.needles) / len(self.context)


Make = Callable[[Tokenizer, str, int, int, int], Iterator[Prompt]]
"""(tokenizer, task, length, seed, count) -> that many prompts, the first ones of the seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Which prompts are answered, under which policies and budgets.

    Attributes:
        make: makes the prompts.
        tasks: which.
        lengths: tokens of a prompt and its answer.
        prompts: of each task and length.
        policies: names, see `kvjax.infer.evaluate_policies`.
        budgets: see `kvjax.select.parse_budget`.
        protocols: A: the question is part of what is compressed; B: it comes afterwards.
        rows: prompts that are computed at a time.
        page_size: tokens of a page.
        seed: of the prompts.
        tags: what a policy is told of a prompt's task: "true", "wrong", "none", or what the model's
            own "classifier" says. Results of others than "true" are named POLICY@TAGS.
    """

    make: Make
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    prompts: int
    policies: tuple[str, ...]
    budgets: tuple[str, ...]
    protocols: tuple[str, ...] = ("A",)
    rows: int = 16
    page_size: int = 4
    seed: int = 3_000_000
    tags: str = "true"


def read_suite(name: str) -> Suite:
    """The suite of `kvjax.configs.eval_<name>`.

    Raises:
        InputError: there is none of this name.
    """
    package = importlib.import_module("kvjax.configs")
    found = [module.name for module in pkgutil.iter_modules(package.__path__)]
    names = [module.removeprefix("eval_") for module in found if module.startswith("eval_")]
    if name not in names:
        raise InputError(f"no suite {name!r}: use one of {', '.join(sorted(names))}")
    return importlib.import_module(f"kvjax.configs.eval_{name}").suite


def split_chat(tokenizer: Tokenizer, context: str, question: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a context, as they begin whatever is asked, and ids of the rest up to the answer."""

    def encode(question: str) -> np.ndarray:
        text = context + question
        if tokenizer.chat_template is None:
            return np.asarray(tokenizer.encode(text), np.int32)
        return np.asarray(tokenizer.encode_chat([{"role": "user", "content": text}]), np.int32)

    whole, other = encode(question), encode("!" if question[:1] != "!" else "?")
    shorter = min(len(whole), len(other))
    differs = np.flatnonzero(whole[:shorter] != other[:shorter])
    cut = min(int(differs[0]) if differs.size else shorter, len(whole) - 1)
    return whole[:cut], whole[cut:]
