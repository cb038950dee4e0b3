"""Scores of given texts: how likely a model finds a continuation of a prompt."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.errors import InputError
from kvjax.infer.answers import Completion
from kvjax.infer.sampling import SamplingParams
from kvjax.models.tokenizer import Tokenizer

__all__ = ["Score", "join", "score_of", "scoring"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How likely a continuation is.

    Attributes:
        logprob: its natural log-probability, given the prompt.
        token_ids: of the continuation.
        token_logprobs: of each of them; their sum is `logprob`.
    """

    logprob: float
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]


def join(
    tokenizer: Tokenizer | None,
    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]],
    continuation: str | Sequence[int],
) -> tuple[list[int], int]:
    """The tokens of a prompt and its continuation, and the place of the continuation's first.

    Two texts are split as one, so that the tokens are those that the model was trained to see; a
    token that is partly of either counts as the continuation's. A chat is continued by the model's
    answer.

    Raises:
        InputError: text without a tokenizer, or nothing on one of the sides.
    """
    ids, start = _join(tokenizer, prompt, continuation)
    if start == 0:
        raise InputError("the prompt is empty: give it at least one token")
    if start == len(ids):
        raise InputError("the continuation is empty: give it at least one token")
    return ids, start


def _join(
    tokenizer: Tokenizer | None, prompt: Any, continuation: str | Sequence[int]
) -> tuple[list[int], int]:
    is_text = isinstance(prompt, str)
    is_chat = not is_text and bool(prompt) and isinstance(prompt[0], Mapping)
    after = continuation
    if is_text or is_chat:
        # A template's text already holds its special tokens.
        text = prompt if is_text else _known(tokenizer).apply_chat_template(prompt)
        if isinstance(after, str):
            joined = _known(tokenizer).backend.encode(text + after, add_special_tokens=is_text)
            reach = (i for i, (_, end) in enumerate(joined.offsets) if end > len(text))
            return joined.ids, next(reach, len(joined.ids))
        before = _known(tokenizer).encode(text, add_special=is_text)
    else:
        before = list(prompt)
    if isinstance(after, str):
        after = _known(tokenizer).encode(after, add_special=False)
    return [*before, *after], len(before)


def _known(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise InputError("the model's folder has no tokenizer.json: give token ids, or add it")
    return tokenizer


def scoring(start: int) -> SamplingParams:
    """What asks for the log-probabilities from a token on and draws nothing."""
    return SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=start)


def score_of(completion: Completion) -> Score:
    """The score in the answer to `scoring`."""
    scores = [score for score in completion.prompt_logprobs or () if score is not None]
    return Score(
        logprob=sum(score.logprob for score in scores),
        token_ids=tuple(score.token for score in scores),
        token_logprobs=tuple(score.logprob for score in scores),
    )
