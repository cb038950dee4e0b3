"""Answers as they grow: text from tokens, the texts that end them, log-probabilities."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from kvjax.infer.draw import Logprobs
from kvjax.infer.engine import Output
from kvjax.infer.sampling import SamplingParams
from kvjax.models.tokenizer import TextStream

__all__ = ["Answer", "Chunk", "Completion", "TokenLogprob"]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability under the model, and the likeliest ones in its place.

    Attributes:
        token: its id.
        logprob: of it.
        top: (token, log-probability) pairs, likeliest first, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer.

    Attributes:
        text: without special tokens and without the text that ended it.
        token_ids: what was generated, a token that ended it included.
        finish_reason: "stop" or "length".
        prompt_tokens: how many tokens the prompt had.
        logprobs: one for each token, if they were asked for.
        prompt_logprobs: one for each token of the prompt, if they were asked for. None for the
            first, which nothing predicts.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of an answer as it is generated.

    Attributes:
        index: which prompt of the call.
        choice: which of the prompt's `n` answers.
        text: what is new; may be empty where a token ends within a character.
        completion: the whole answer, with its last piece.
    """

    index: int
    choice: int = 0
    text: str = ""
    completion: Completion | None = None


class Answer:
    """An answer that grows by `add` until that returns a completion."""

    def __init__(
        self, index: int, choice: int, prompt: Sequence[int], params: SamplingParams,
        stream: TextStream, score_from: int | None,
    ) -> None:  # fmt: skip
        self.index = index
        self.choice = choice
        self._prompt = prompt
        self._params = params
        self._stream = stream
        self._tokens: list[int] = []
        self._text = ""
        self._shown = 0  # characters of the text that were given out
        self._stops_from = 0  # where a text that ends the answer may begin
        self._logprobs: list[TokenLogprob] = []
        self._scores: list[TokenLogprob | None] = [None] * (score_from or 0)

    def add(self, output: Output) -> Chunk:
        """Takes what a call has brought; the chunk has the completion if that was the last."""
        reason = output.finish_reason
        for i, token in enumerate(output.tokens):
            self._tokens.append(token)
            if self._params.logprobs is not None and output.logprobs is not None:
                self._logprobs.append(_logprob(token, output.logprobs, i, self._params.logprobs))
            self._text += self._stream.push(token)
            if self._cut():
                return self._chunk("stop")
        if output.scores is not None:
            self._add_scores(output.scores)
        if reason:
            self._text += self._stream.flush()
            reason = "stop" if self._cut() else reason
        return self._chunk(reason)

    def _chunk(self, reason: str | None) -> Chunk:
        end = len(self._text) if reason else len(self._text) - self._held_back()
        text, self._shown = self._text[self._shown : end], end
        completion = self._completion(reason) if reason else None
        return Chunk(index=self.index, choice=self.choice, text=text, completion=completion)

    def _cut(self) -> bool:
        """Ends the text before the first of the texts that end it, if it holds one."""
        if len(self._tokens) < self._params.min_tokens:
            self._stops_from = len(self._text)
            return False
        # What was given out holds no beginning of one: `_held_back` saw to that.
        start = max(self._shown, self._stops_from)
        places = (self._text.find(stop, start) for stop in self._params.stop)
        first = min((place for place in places if place >= 0), default=None)
        if first is None:
            return False
        self._text = self._text[:first]
        return True

    def _held_back(self) -> int:
        """How many of the last characters may be the beginning of a text that ends the answer."""
        longest = max((len(stop) for stop in self._params.stop), default=0)
        for n in range(min(longest - 1, len(self._text) - self._shown), 0, -1):
            if any(stop.startswith(self._text[-n:]) for stop in self._params.stop):
                return n
        return 0

    def _add_scores(self, scores: Logprobs) -> None:
        top = self._params.prompt_logprobs or 0
        for i in range(len(scores.chosen)):
            token = self._prompt[len(self._scores)]
            self._scores.append(_logprob(token, scores, i, top))

    def _completion(self, reason: str) -> Completion:
        asked = self._params
        return Completion(
            text=self._text,
            token_ids=tuple(self._tokens),
            finish_reason=reason,
            prompt_tokens=len(self._prompt),
            logprobs=None if asked.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=None if asked.prompt_logprobs is None else tuple(self._scores),
        )


def _logprob(token: int, logprobs: Logprobs, i: int, top: int) -> TokenLogprob:
    likeliest = zip(
        np.asarray(logprobs.top_token)[i, :top].tolist(),
        np.asarray(logprobs.top)[i, :top].tolist(),
        strict=True,
    )
    pairs = tuple((other, value) for other, value in likeliest if other >= 0)
    return TokenLogprob(token, float(logprobs.chosen[i]), pairs)
