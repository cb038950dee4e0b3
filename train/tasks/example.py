"""What every task makes: a document, questions about it, and their answers."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from kvjax.errors import InputError
from kvjax.train.tasks.words import count_tokens, draw_noise

__all__ = ["Example", "Setting", "begin", "finish", "fitting", "most", "turns_tokens"]

_OPENING = 3  # <|bos|><|system|> and a line break
_TURN = 5  # <|user|>, <|assistant|>, a line break after each, <|eos|>


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How long an example is and how hard.

    Attributes:
        tokens: the most that the whole chat has, answers included.
        questions: the most that are asked of a document; fewer where they would take more than
            about half of the tokens.
        fill: the least share of `tokens` that an example is drawn to fill, and no less than 108
            tokens; 1 is always all.
        shared_words: whether records share the words of their keys. Without it one word finds a
            record: where learning starts.
    """

    tokens: int = 1024
    questions: int = 8
    fill: float = 0.75
    shared_words: bool = True

    def __post_init__(self) -> None:
        if self.questions < 1 or not 108 <= self.fill * self.tokens <= self.tokens:
            raise InputError(f"{self}: ask 1 question or more, fill 108 tokens or more, 1 at most")


@dataclasses.dataclass(frozen=True)
class Example:
    """A document and what is asked about it.

    Attributes:
        task: its name, a key of `TASKS`.
        document: readable text; empty where the question says all.
        questions, answers: as many of each.
    """

    task: str
    document: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]

    def messages(self) -> list[dict[str, str]]:
        """The whole chat: the document as the system message, then each question and answer."""
        chat = [{"role": "system", "content": self.document}] if self.document else []
        for question, answer in zip(self.questions, self.answers, strict=True):
            chat.append({"role": "user", "content": question})
            chat.append({"role": "assistant", "content": answer})
        return chat

    def right(self, question: int, answer: str) -> bool:
        """Whether an answer to a question is the true one, but for white space around it."""
        return answer.strip() == self.answers[question]


def begin(rng: np.random.Generator, setting: Setting) -> int:
    """How many tokens this example is to fill: any number, and rather a high one than a low one."""
    least = int(setting.fill * setting.tokens)
    return int(rng.integers(least, setting.tokens, 2, endpoint=True).max())


def most(tokens: int, setting: Setting, turn: int) -> int:
    """How many questions of `turn` tokens each, with their answers, are asked: at least one."""
    return max(1, min(setting.questions, tokens // 2 // (turn + _TURN)))


def fitting(
    rng: np.random.Generator, tokens: int, asked: int, fact: int, *, least: int, limit: int
) -> int:
    """How many facts of `fact` tokens each a document gets: from `least` to what fits, or `limit`.

    Where fewer than `least` fit it is those, and always at least one.

    Args:
        rng: draws.
        tokens: of the whole example.
        asked: tokens of all questions and answers.
        fact: tokens of one.
        least: the fewest wanted.
        limit: the most.
    """
    room = max(1, min(limit, (tokens - _OPENING - asked) // fact))
    return int(rng.integers(min(least, room), room, endpoint=True))


def turns_tokens(questions: int, turn: int) -> int:
    """Tokens of `questions` questions of `turn` tokens each, answers included, and their frame."""
    return questions * (turn + _TURN)


def finish(
    rng: np.random.Generator,
    task: str,
    tokens: int,
    facts: Sequence[str],
    turns: Sequence[tuple[str, str]],
    pairs: Sequence[str] = (),
) -> Example:
    """The example: the facts in any order, noise between them up to `tokens`, the questions."""
    used = _OPENING + sum(map(count_tokens, facts))
    used += sum(_TURN + count_tokens(q) + count_tokens(a) for q, a in turns)
    lines = [*facts, *draw_noise(rng, tokens - used, pairs)]
    document = " ".join(lines[i] for i in rng.permutation(len(lines)))
    questions, answers = zip(*turns, strict=True)
    return Example(task, document, questions, answers)
