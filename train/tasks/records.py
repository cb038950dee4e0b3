"""Questions about the records of a document: the task that the built-in model `tiny` learns.

A document is a paragraph of sentences like "The code of the red falcon is 4719.". Other records of
the document share each word of a key ("the price of the red falcon", "the code of the red heron"),
so that only all three together find a value. Sentences that say nothing stand between the records.
Values have four digits, each a token of its own. Every example is a pure function of a seed and an
index, so that a training run reads the same data when it resumes, and an evaluation reads other
data when it takes another seed.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

__all__ = [
    "Difficulty",
    "Example",
    "Record",
    "exact_match",
    "make_example",
    "sentences",
]

ATTRIBUTES = ("code", "price", "weight", "year")
ADJECTIVES = (
    "red", "blue", "green", "black", "white", "gold", "silver", "grey",
    "old", "young", "small", "big", "quiet", "loud", "brave", "calm",
)  # fmt: skip
NOUNS = (
    "falcon", "heron", "otter", "badger", "fox", "wolf", "bear", "lion",
    "tiger", "horse", "rabbit", "beaver", "raven", "eagle", "lizard", "camel",
)  # fmt: skip
FILLERS = (
    "Nothing else was noted that day.",
    "The next page is blank.",
    "It rained all morning.",
    "Someone counted them twice.",
    "The list was copied by hand.",
    "Please keep this list dry.",
    "The clerk went home early.",
    "A few names were left out.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How long a document is and what stands in the way.

    Attributes:
        min_records, max_records: bounds of the number of records, both included.
        questions: asked of each document, or all records where it has fewer.
        shared_words: whether records share the words of their keys. Without it one word finds a
            record: where learning starts.
    """

    min_records: int = 8
    max_records: int = 24
    questions: int = 8
    shared_words: bool = True

    def __post_init__(self) -> None:
        most = len(ADJECTIVES) * len(NOUNS) if self.shared_words else len(NOUNS)
        if not 1 <= self.min_records <= self.max_records <= most or self.questions < 1:
            raise ValueError(f"{self} asks for no question or for other than 1 to {most} records")

    @property
    def answer_tokens(self) -> int:
        """How many tokens all answers have together: four digits and the end."""
        return 5 * self.questions

    def make(self, seed: int, index: int) -> "Example":
        """The example number `index` of a seed."""
        return make_example(seed, index, self)

    def alone(self) -> "Difficulty":
        """The same with one question a document, for an evaluation."""
        return dataclasses.replace(self, questions=1)

    @staticmethod
    def corpus() -> Iterator[str]:
        """What its tokenizer is trained on."""
        return sentences()


@dataclasses.dataclass(frozen=True)
class Record:
    """One fact of a document."""

    attribute: str
    adjective: str
    noun: str
    value: str

    @property
    def sentence(self) -> str:
        """The record as the document words it."""
        return f"The {self.attribute} of the {self.adjective} {self.noun} is {self.value}."

    @property
    def question(self) -> str:
        """What a user asks; the answer is the bare value."""
        return f"What is the {self.attribute} of the {self.adjective} {self.noun}?"


@dataclasses.dataclass(frozen=True)
class Example:
    """A document and the records that are asked for, in the order of the questions."""

    document: str
    records: tuple[Record, ...]
    asked: tuple[Record, ...]

    def messages(self) -> list[dict[str, str]]:
        """The whole chat: the document as the system message, then each question and answer."""
        chat = [{"role": "system", "content": self.document}]
        for record in self.asked:
            chat.append({"role": "user", "content": record.question})
            chat.append({"role": "assistant", "content": record.value})
        return chat


def make_example(seed: int, index: int, difficulty: Difficulty) -> Example:
    """The example number `index` of a seed: the same arguments give the same example."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, index)))
    records = _records(rng, difficulty)
    lines = [record.sentence for record in records]
    for _ in range(rng.integers(0, len(records) // 5, endpoint=True)):
        filler = FILLERS[rng.integers(len(FILLERS))]
        lines.insert(int(rng.integers(0, len(lines), endpoint=True)), filler)
    asked = rng.permutation(len(records))[: difficulty.questions]
    return Example(" ".join(lines), records, tuple(records[i] for i in asked))


def _records(rng: np.random.Generator, difficulty: Difficulty) -> tuple[Record, ...]:
    count = int(rng.integers(difficulty.min_records, difficulty.max_records, endpoint=True))
    keys = _shared_keys(rng, count) if difficulty.shared_words else _lone_keys(rng, count)
    values = rng.integers(1000, 10_000, count)
    return tuple(Record(*key, str(value)) for key, value in zip(keys, values, strict=True))


def _shared_keys(rng: np.random.Generator, count: int) -> list[tuple[str, str, str]]:
    """Different keys out of few words: a document's two attributes, some adjectives and nouns."""
    words = max(2, math.ceil(math.sqrt(count)))
    attributes, adjectives, nouns = (
        [choices[i] for i in rng.permutation(len(choices))[:size]]
        for choices, size in ((ATTRIBUTES, 2), (ADJECTIVES, words), (NOUNS, words))
    )
    keys = list(itertools.product(attributes, adjectives, nouns))
    return [keys[i] for i in rng.permutation(len(keys))[:count]]


def _lone_keys(rng: np.random.Generator, count: int) -> list[tuple[str, str, str]]:
    """Keys of which any adjective or noun stands in one only."""
    attributes = rng.integers(0, len(ATTRIBUTES), count)
    adjectives = rng.permutation(len(ADJECTIVES))[:count]
    nouns = rng.permutation(len(NOUNS))[:count]
    triples = zip(attributes, adjectives, nouns, strict=True)
    return [(ATTRIBUTES[t], ADJECTIVES[a], NOUNS[n]) for t, a, n in triples]


def exact_match(answer: str, expected: str) -> bool:
    """Whether an answer is the value and nothing else, but for white space around it."""
    return answer.strip() == expected


def sentences() -> Iterator[str]:
    """Text with every word of the task, in the places where it stands: a tokenizer's corpus."""
    for adjective, noun in zip(ADJECTIVES, NOUNS, strict=True):
        for attribute in ATTRIBUTES:
            record = Record(attribute, adjective, noun, "1")
            yield f"{record.sentence} {record.sentence}"
            yield record.question
    for filler in FILLERS:
        yield from (f"{filler} {filler}",) * len(ADJECTIVES)
