"""The OpenAI batch form: answers, written as its lines."""

import functools
import time
from collections.abc import Sequence
from typing import Any

from kvjax.infer.answers import Completion, TokenLogprob
from kvjax.infer.batch_form import CHAT, COMPLETIONS, SCORE, BatchRequest
from kvjax.models.tokenizer import Tokenizer

__all__ = ["TokenNames", "answer_record", "chat_logprobs", "error_record"]

_OBJECTS = {COMPLETIONS: "text_completion", CHAT: "chat.completion", SCORE: "score"}


class TokenNames:
    """How tokens are called in answers: by their texts, or by their ids where they have none."""

    def __init__(self, tokenizer: Tokenizer | None, *, ids: bool = False) -> None:
        self.tokenizer = tokenizer
        self._ids = ids or tokenizer is None
        self._name = functools.cache(self._find)

    def __call__(self, token: int) -> str:
        """The name of a token."""
        return self._name(token)

    def _find(self, token: int) -> str:
        if self._ids or self.tokenizer is None:
            return f"token_id:{token}"
        return self.tokenizer.decode([token], skip_special=False)

    def offsets(self, tokens: Sequence[int], start: int) -> list[int]:
        """Where in the text each token's part begins, the first one's at `start`."""
        offsets, stream = [], self.tokenizer.stream() if self.tokenizer else None
        for token in tokens:
            offsets.append(start)
            start += len(stream.push(token)) if stream else 0
        return offsets


def error_record(request: BatchRequest, message: str) -> dict[str, Any]:
    """The line of a request that cannot be answered."""
    error = {"code": "invalid_request", "message": message, "line": request.line}
    return {
        "id": f"batch_req_{request.line}",
        "custom_id": request.custom_id,
        "response": None,
        "error": error,
    }


def answer_record(
    request: BatchRequest,
    tokens: Sequence[int],
    completions: Sequence[Completion],
    names: TokenNames,
    model: str,
) -> dict[str, Any]:
    """The line of an answered request.

    Args:
        request: what was asked.
        tokens: of its prompt; for a score those of the continuation follow.
        completions: its `n` answers in order.
        names: how tokens are called.
        model: the name that the answer carries.
    """
    generated = sum(len(completion.token_ids) for completion in completions)
    body = {
        "id": f"req_{request.line}",
        "object": _OBJECTS[request.url],
        "created": int(time.time()),
        "model": model,
        **_result(request, tokens, completions, names),
        "usage": {
            "prompt_tokens": len(tokens),
            "completion_tokens": generated,
            "total_tokens": len(tokens) + generated,
        },
    }
    response = {"status_code": 200, "request_id": f"req_{request.line}", "body": body}
    return {
        "id": f"batch_req_{request.line}",
        "custom_id": request.custom_id,
        "response": response,
        "error": None,
    }


def _result(
    request: BatchRequest, tokens: Sequence[int], completions: Sequence[Completion],
    names: TokenNames,
) -> dict[str, Any]:  # fmt: skip
    scores = completions[0].prompt_logprobs or ()  # of the prompt, so the first one's are all's
    if request.url == SCORE:
        return _score([score for score in scores if score is not None], names)
    apart = {}
    if request.prompt_logprobs is not None:
        shown = [_prompt_logprob(score, request.prompt_logprobs, names) for score in scores]
        apart = {"prompt_logprobs": shown}
    if request.url == CHAT:
        choices = [_chat_choice(i, c, names) for i, c in enumerate(completions)]
        return {"choices": choices, **apart}
    texts = _TextChoices(request, tokens, scores, names)
    choices = [{**texts.choice(i, c), **apart} for i, c in enumerate(completions)]
    return {"choices": choices}


def _chat_choice(index: int, completion: Completion, names: TokenNames) -> dict[str, Any]:
    logprobs = completion.logprobs
    return {
        "index": index,
        "message": {"role": "assistant", "content": completion.text},
        "logprobs": None if logprobs is None else {"content": chat_logprobs(logprobs, names)},
        "finish_reason": completion.finish_reason,
    }


def chat_logprobs(logprobs: Sequence[TokenLogprob], names: TokenNames) -> list[dict[str, Any]]:
    """Tokens and their alternatives as chats write them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        name = names(token)
        # A token that is only part of a character has no bytes of its own here.
        known = None if "\ufffd" in name else list(name.encode())
        return {"token": name, "logprob": _finite(logprob), "bytes": known}

    return [
        {**entry(x.token, x.logprob), "top_logprobs": [entry(*other) for other in x.top]}
        for x in logprobs
    ]


class _TextChoices:
    """Completions, with the prompt before them where that is asked for."""

    def __init__(
        self, request: BatchRequest, tokens: Sequence[int],
        scores: Sequence[TokenLogprob | None], names: TokenNames,
    ) -> None:  # fmt: skip
        self._names, self._top = names, request.params.logprobs
        self._text, self._tokens, self._scores = "", list[int](), list[TokenLogprob | None]()
        if request.echo:
            self._text = _prompt_text(request, tokens, names)
            self._tokens, self._scores = list(tokens), list(scores)

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._text + completion.text,
            "logprobs": None if self._top is None else self._logprobs(completion),
            "finish_reason": completion.finish_reason,
        }

    def _logprobs(self, completion: Completion) -> dict[str, Any]:
        names, ids = self._names, completion.token_ids
        known = [*self._scores, *(completion.logprobs or ())]
        before = names.offsets(self._tokens, 0)
        return {
            "tokens": [names(token) for token in (*self._tokens, *ids)],
            "token_logprobs": [None if x is None else _finite(x.logprob) for x in known],
            "top_logprobs": [None if x is None else self._alternatives(x) for x in known],
            "text_offset": before + names.offsets(ids, len(self._text)),
        }

    def _alternatives(self, logprob: TokenLogprob) -> dict[str, float]:
        named: dict[str, float] = {}
        for token, value in logprob.top[: self._top]:
            named.setdefault(self._names(token), _finite(value))  # the likeliest of one name
        # The token itself as well, so that there may be one more than asked for.
        named.setdefault(self._names(logprob.token), _finite(logprob.logprob))
        return named


def _prompt_text(request: BatchRequest, tokens: Sequence[int], names: TokenNames) -> str:
    if isinstance(request.prompt, str):
        return request.prompt
    return names.tokenizer.decode(tokens) if names.tokenizer else ""


def _prompt_logprob(
    score: TokenLogprob | None, top: int, names: TokenNames
) -> dict[str, Any] | None:
    """A token of the prompt and its alternatives as vLLM writes them: by id, the token first."""
    if score is None:
        return None
    ranks = {token: rank for rank, (token, _) in enumerate(score.top, 1)}
    pairs = {score.token: score.logprob, **dict(score.top[:top])}
    return {
        str(token): {
            "logprob": _finite(value), "rank": ranks.get(token), "decoded_token": names(token)
        }
        for token, value in pairs.items()
    }  # fmt: skip


def _score(scores: Sequence[TokenLogprob], names: TokenNames) -> dict[str, Any]:
    return {
        "logprob": _finite(sum(score.logprob for score in scores)),
        "token_logprobs": [_finite(score.logprob) for score in scores],
        "tokens": [names(score.token) for score in scores],
    }


def _finite(logprob: float) -> float:
    """JSON has no infinities; and float32 knows no more digits."""
    return round(max(-9999.0, logprob), 6)
