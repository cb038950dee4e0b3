"""What a search has to know of its questions: how steps end, which answers are equal and right."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from kvjax.errors import InputError
from kvjax.infer.llm import LLM, Prompt
from kvjax.infer.search.answers import last_number_or_box, same_answer
from kvjax.infer.search.loop import question_text
from kvjax.infer.search.tree import Node
from kvjax.models.countdown.game import DEEP_ENDS, STEP_ENDS, judge, read_problem, state_key
from kvjax.plan.tree_clusters import equal_keys

__all__ = ["TASKS", "SearchTask", "as_prompt", "equal_text"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchTask:
    """A kind of questions.

    Attributes:
        step_ends: texts that end a step.
        step_tokens: the most of a step.
        max_tokens: of a solution.
        vote: how the answer is chosen, see `choose`.
        finished: whether a solution ends with what was written: `(question, text) -> bool`.
        extract: the answer in a solution, or None.
        same: whether two answers are equal.
        right: whether a solution, or the answer in it, is right: `(question, text, expected)`.
        state: what a beginning has come to, where that is known: `(question, text) -> key`.
    """

    step_ends: tuple[str, ...]
    step_tokens: int
    max_tokens: int
    vote: str
    finished: Callable[[Prompt, str], bool]
    extract: Callable[[str], str | None]
    same: Callable[[str, str], bool]
    right: Callable[[str, str, str | None], bool]
    state: Callable[[str, str], str] | None = None

    def check(self, question: str) -> None:
        """Raises InputError for a question that is none of this kind."""
        if self.state is not None:
            try:
                read_problem(question)
            except ValueError:
                raise InputError(
                    f"{question!r} is no problem of Countdown: write it as '3 7 10 2 5>24'"
                ) from None

    def states(self, leaves: Sequence[Node]) -> np.ndarray:
        """Clusters of leaves whose true states are equal.

        Raises:
            InputError: nobody knows the states of this task.
        """
        if self.state is None:
            raise InputError("the true states of these questions are not known: use other clusters")
        question = leaves[0].lineage()[0].text
        return equal_keys([self.state(question, leaf.answer()) for leaf in leaves])


def equal_text(leaves: Sequence[Node]) -> np.ndarray:
    """Clusters of leaves whose last steps are the same text."""
    return equal_keys([leaf.text for leaf in leaves])


def as_prompt(llm: LLM, question: str) -> Prompt:
    """A question as the model's users ask it."""
    chats = llm.tokenizer is not None and llm.tokenizer.chat_template is not None
    return [{"role": "user", "content": question}] if chats else question


def _played(question: Prompt, text: str) -> bool:
    return text.count(";") >= len(read_problem(question_text(question)).numbers) - 1


def _right_answer(question: str, text: str, expected: str | None) -> bool:
    found = last_number_or_box(text)
    return found is not None and expected is not None and same_answer(found, expected)


_COUNTDOWN = SearchTask(
    step_ends=STEP_ENDS,
    step_tokens=32,
    max_tokens=100,
    vote="best",
    finished=_played,
    extract=lambda text: text or None,
    same=lambda a, b: a == b,
    right=lambda question, text, expected: judge(read_problem(question), text),
    state=lambda question, text: state_key(read_problem(question), text),
)
TASKS: dict[str, SearchTask] = {
    "math": SearchTask(
        step_ends=("\n\n",),
        step_tokens=256,
        max_tokens=1024,
        vote="weighted",
        finished=lambda question, text: "answer is" in text.rpartition("\n\n")[2],
        extract=last_number_or_box,
        same=same_answer,
        right=_right_answer,
    ),
    "countdown": _COUNTDOWN,
    "countdown-deep": dataclasses.replace(_COUNTDOWN, step_ends=DEEP_ENDS),
}
"""By name. countdown-deep takes three steps for each of countdown's; the model is the same."""
