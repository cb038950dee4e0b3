"""Batches of requests with the shapes that BatchLLM is measured on (arXiv 2412.03594)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from kvjax.errors import InputError
from kvjax.plan import Request

__all__ = ["WORKLOADS", "Shape", "industry", "levels", "make_workload", "micro"]

# What `make_workload` knows, and what each is.
WORKLOADS = {
    "w1": "equal requests over shared documents, in random order",
    "w2": "search snippets: documents of many lengths with a few questions each",
    "w3": "w1, but half of the documents' answers are short and half are long",
    "w4": "one system prompt, documents, a few questions on each: several levels",
    "w5": "w1, but nothing is shared",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of `micro` requests, in tokens.

    Attributes:
        requests: how many.
        shared: tokens of a document.
        own: tokens of a question.
        output: tokens of an answer.
        degree: questions on a document.
    """

    requests: int = 6400
    shared: int = 2000
    own: int = 200
    output: int = 100
    degree: int = 16

    def scaled(self, by: int) -> "Shape":
        """A `by`-th of the requests and of the tokens of each."""
        small = {k: max(1, v // by) for k, v in dataclasses.asdict(self).items() if k != "degree"}
        return Shape(**small, degree=self.degree)


def make_workload(name: str, shape: Shape, seed: int = 0, vocab_size: int = 256) -> list[Request]:
    """A workload of `WORKLOADS` by its name; equal arguments give equal requests.

    Raises:
        InputError: there is no such workload.
    """
    n, long = shape.requests, 4 * shape.output
    short = max(1, shape.output // 5)
    if name == "w1":
        return micro(shape, [shape.output], seed, vocab_size)
    if name == "w2":
        return industry(max(1, n * 1500 // 6400), 1950, seed, vocab_size)
    if name == "w3":
        return micro(shape, [short, long], seed, vocab_size)
    if name == "w4":
        return levels(max(1, n // 6), shape.output, seed, vocab_size)
    if name == "w5":
        whole = dataclasses.replace(shape, own=shape.shared + shape.own, shared=0)
        return micro(whole, [shape.output], seed, vocab_size)
    raise InputError(f"no workload {name!r}: use one of {', '.join(WORKLOADS)}")


def micro(shape: Shape, outputs: Sequence[int], seed: int, vocab_size: int) -> list[Request]:
    """Equal requests over shared documents, in random order.

    Args:
        shape: the sizes.
        outputs: tokens to draw, dealt to the documents in turn instead of `shape.output`.
        seed: of the tokens and of the order.
        vocab_size: tokens are below.
    """
    words = np.random.default_rng(seed)
    documents = words.integers(0, vocab_size, (-(-shape.requests // shape.degree), shape.shared))
    prompts, draws = [], []
    for i in range(shape.requests):
        which = i // shape.degree
        own = words.integers(0, vocab_size, shape.own)
        prompts.append([*documents[which].tolist(), *own.tolist()])
        draws.append(outputs[which % len(outputs)])
    return _requests(prompts, draws, words.permutation(shape.requests))


def industry(groups: int, window: float, seed: int, vocab_size: int) -> list[Request]:
    """Documents with 2.8 questions each in the mean; requests come up to `window` places late."""
    words = np.random.default_rng(seed)
    prompts, draws, place = [], [], []
    for _ in range(groups):
        length = int(np.clip(words.lognormal(7.35, 0.5), 200, 6000))
        document = words.integers(0, vocab_size, length).tolist()
        first = len(prompts)
        for _ in range(int(words.geometric(1 / 2.8))):
            own = words.integers(0, vocab_size, words.integers(80, 251))
            prompts.append([*document, *own.tolist()])
            draws.append(int(words.integers(20, 161)))
            place.append(first + words.uniform(0, window))
    return _requests(prompts, draws, np.argsort(place))


def levels(documents: int, output: int, seed: int, vocab_size: int) -> list[Request]:
    """A system prompt of 40 tokens before documents of 818; 5 or 6 questions of 142 on each."""
    words = np.random.default_rng(seed)
    system = words.integers(0, vocab_size, 40).tolist()
    prompts: list[list[int]] = []
    for i in range(documents):
        document = words.integers(0, vocab_size, 818).tolist()
        for _ in range(5 + i % 2):
            prompts.append([*system, *document, *words.integers(0, vocab_size, 142).tolist()])
    return _requests(prompts, [output] * len(prompts), words.permutation(len(prompts)))


def _requests(
    prompts: Sequence[list[int]], draws: Sequence[int], order: np.ndarray
) -> list[Request]:
    return [
        Request(id=i, prompt=tuple(prompts[which]), max_tokens=draws[which])
        for i, which in enumerate(order.tolist())
    ]
