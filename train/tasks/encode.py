"""Chats of the tasks to token ids, fast enough for a training run.

A tokenizer takes longer over a document than all else together. Its words repeat, and what a word
becomes does not depend on the words around it, so each is looked up.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.models.tokenizer import Tokenizer
from kvjax.train.chat import ASSISTANT, EOS

__all__ = ["ChatEncoder", "stretch"]


@dataclasses.dataclass(frozen=True)
class ChatEncoder:
    """Makes ids of whole chats, and remembers what words become.

    It is for tokenizers that split a text before its spaces and for which a word's ids do not
    depend on its neighbours, as those of `train_tokenizer` where no two spaces meet.

    Attributes:
        tokenizer: what it agrees with.
        words: what it remembers; the words of the tasks and their numbers are some ten thousands.
    """

    tokenizer: Tokenizer
    words: dict[str, list[int]] = dataclasses.field(default_factory=dict, repr=False)

    def encode(self, chat: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Ids int32[T]: those of `Tokenizer.encode_chat`, without the opening of an answer."""
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=False)
        ids: list[int] = []
        for piece in text.replace(" ", "\0 ").split("\0"):
            known = self.words.get(piece)
            if known is None:
                known = self.words[piece] = self.tokenizer.encode(piece, add_special=False)
            ids += known
        return np.asarray(ids, np.int32)

    def answer_places(self, ids: np.ndarray) -> np.ndarray:
        """Positions before each token of each answer, the ends included: int[answer tokens]."""
        # An answer is what stands between the line break after its mark and the end.
        token_id = self.tokenizer.backend.token_to_id
        starts = np.flatnonzero(ids == token_id(ASSISTANT)) + 1
        ends = np.flatnonzero(ids == token_id(EOS))
        return np.concatenate([np.arange(s, e) for s, e in zip(starts, ends, strict=True)])

    def stops(self, ids: np.ndarray) -> np.ndarray:
        """Where sentences end: int[sentences]."""
        return np.flatnonzero(ids == self.tokenizer.backend.token_to_id("."))


def stretch(rng: np.random.Generator, length: int, stops: np.ndarray, longest: int) -> np.ndarray:
    """Positions int32[T] that grow by one, but for up to three gaps after some of the stops.

    A model that sees gaps knows distances longer than the sequences that it is trained on, and what
    stands between two stops stays as it is (after Ruoss et al. 2023, who draw all positions).

    Args:
        rng: draws; half of the sequences get no gap.
        length: T.
        stops: places after which a gap may be.
        longest: positions stay below it.
    """
    positions = np.arange(length, dtype=np.int32)
    spare = longest - length
    if spare <= 0 or not stops.size or rng.integers(2):
        return positions
    total = int(rng.integers(0, spare, endpoint=True))
    cuts = np.sort(rng.integers(0, total, 2, endpoint=True))
    gaps = np.diff(cuts, prepend=0, append=total)
    for place, gap in zip(rng.choice(stops, 3), gaps, strict=True):
        positions[place + 1 :] += gap
    return positions
