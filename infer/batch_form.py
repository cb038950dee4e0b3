"""The OpenAI batch form: the lines of a batch file, read as requests.

A line is {"custom_id", "method", "url", "body"}. The bodies of chats and completions take what
OpenAI's take and, under vLLM's names, what `SamplingParams` has beyond that. A body of "/v1/score"
is {"prompt", "continuation"}, each text or token ids.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, TypeGuard

from kvjax.errors import InputError
from kvjax.infer.llm import Prompt
from kvjax.infer.sampling import SamplingParams

__all__ = ["CHAT", "COMPLETIONS", "SCORE", "BatchRequest", "read_requests"]

CHAT, COMPLETIONS, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/score"

_INT, _NUMBER, _BOOL = (int,), (int, float), (bool,)
_SAID = {_INT: "an integer", _NUMBER: "a number", _BOOL: "true or false"}

_GENERATION = {
    "max_tokens", "expected_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "n",
    "stop", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs",
    "return_tokens_as_token_ids",
}  # fmt: skip
_USED = {
    CHAT: _GENERATION | {"messages", "max_completion_tokens", "top_logprobs"},
    COMPLETIONS: _GENERATION | {"prompt", "echo", "best_of"},
    SCORE: {"prompt", "continuation"},
}
# What a body may say beside what is used; the value, where one stands, is the only one allowed.
_IGNORED = {"user", "metadata", "store", "model", "service_tier", "stream_options"}
_NEUTRAL: dict[str, Any] = {
    "stream": False, "suffix": "", "tools": [], "response_format": {"type": "text"}, "echo": False,
    "top_logprobs": 0, "best_of": 1, "skip_special_tokens": True, "add_generation_prompt": True,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """One line of a batch file.

    Attributes:
        line: its number, from 1 on.
        custom_id: its name; None where it has none that could be used.
        url: what it asks for.
        prompt: text, token ids or messages.
        params: of the answer; scores have none of their own.
        continuation: what is scored after the prompt.
        echo: whether the answer's text begins with the prompt.
        prompt_logprobs: how many alternatives of the prompt's tokens are shown apart from the
            answer; None: no log-probabilities of them.
        token_ids: whether tokens are named "token_id:7" and so on instead of by their texts.
        error: why it cannot be answered.
    """

    line: int
    custom_id: str | None
    url: str = ""
    prompt: Prompt = ""
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    continuation: str | list[int] | None = None
    echo: bool = False
    prompt_logprobs: int | None = None
    token_ids: bool = False
    error: str | None = None


def read_requests(path: Path) -> list[BatchRequest]:
    """Reads a batch file; lines that make no sense become requests with an error.

    Raises:
        InputError: the file cannot be read, or holds no request.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}: give a readable file of JSON lines") from e
    requests, seen = [], set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        request = _parse_line(number, line)
        if request.custom_id is not None and request.custom_id in seen:
            message = f"custom_id {request.custom_id!r} stands on an earlier line"
            request = BatchRequest(number, None, error=message)
        seen.add(request.custom_id)
        requests.append(request)
    if not requests:
        raise InputError(f"{path}: no requests: write one JSON object a line")
    return requests


def _parse_line(number: int, line: bytes) -> BatchRequest:
    custom_id = None
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("custom_id"), str):
            raise InputError('needs an object with a string "custom_id"')
        custom_id = record["custom_id"]
        _check(record.get("url"), record.get("body"))
        return _parse_body(BatchRequest(number, custom_id, record["url"]), record["body"])
    except UnicodeEncodeError:
        error = "the body has half of a surrogate pair, which is no text"
    except RecursionError:
        error = "nested too deeply"
    except (ValueError, OverflowError) as e:  # not JSON, not UTF-8, or an InputError
        error = str(e)
    return BatchRequest(number, custom_id, error=error)


def _check(url: Any, body: Any) -> None:
    """Refuses what would not be honoured: half of a request is not answered."""
    if not isinstance(url, str) or url not in _USED:
        raise InputError(f"url {url!r} is not supported: use one of {', '.join(_USED)}")
    if not isinstance(body, dict):
        raise InputError('"body" must be an object')
    json.dumps(body, ensure_ascii=False).encode()
    for name, value in body.items():
        neutral = value is None or (name in _NEUTRAL and value == _NEUTRAL[name])
        if name not in _USED[url] | _IGNORED and not neutral:
            raise InputError(f'"{name}": {_shown(value)} is not supported: leave it out')


def _parse_body(request: BatchRequest, body: dict[str, Any]) -> BatchRequest:
    replace = functools.partial(dataclasses.replace, request)
    if request.url == SCORE:
        return replace(prompt=_text(body, "prompt"), continuation=_text(body, "continuation"))
    return replace(
        prompt=_messages(body) if request.url == CHAT else _text(body, "prompt"),
        params=_parse_params(request.url, body),
        echo=bool(_value(body, "echo", _BOOL)),
        prompt_logprobs=_value(body, "prompt_logprobs", _INT),
        token_ids=bool(_value(body, "return_tokens_as_token_ids", _BOOL)),
    )


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not (isinstance(messages, list) and messages):
        raise InputError('"messages" must be a list of {"role", "content"}')
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise InputError('every message must be an object with a "role"')
    return [
        {**message, "content": _content(message["content"])}
        if isinstance(message.get("content"), list) else message
        for message in messages
    ]  # fmt: skip


def _content(parts: list[Any]) -> str:
    """The text of a message that comes in parts, which few templates know."""
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and "text" in part):
            raise InputError(f'"content": {_shown(part)} is not supported: use text alone')
    return "\n".join(str(part["text"]) for part in parts)


def _text(body: dict[str, Any], name: str) -> str | list[int]:
    value = body.get(name)
    if isinstance(value, str) or _is_ids(value):
        return value
    raise InputError(f'"{name}" must be text or a list of token ids')


def _is_ids(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _parse_params(url: str, body: dict[str, Any]) -> SamplingParams:
    read = functools.partial(_value, body)
    # Where a body says nothing, the form's own defaults hold: draws from the model's distribution,
    # and completions of 16 tokens.
    max_tokens = read("max_tokens", _INT, 16 if url == COMPLETIONS else None)
    n, logprobs = read("n", _INT, 1), _logprobs(url, body)
    if read("best_of", _INT, n) != n:
        raise InputError('"best_of" must be "n": no answer is thrown away')
    prompt_logprobs = read("prompt_logprobs", _INT)
    if read("echo", _BOOL) and (logprobs is not None or max_tokens == 0):
        prompt_logprobs = max(logprobs or 0, prompt_logprobs or 0)
    return SamplingParams(
        max_tokens=read("max_completion_tokens", _INT, max_tokens),
        expected_tokens=read("expected_tokens", _INT),
        min_tokens=read("min_tokens", _INT, 0),
        temperature=float(read("temperature", _NUMBER, 1.0)),
        top_k=max(0, read("top_k", _INT, 0)),  # -1 is how vLLM says all
        top_p=float(read("top_p", _NUMBER, 1.0)),
        min_p=float(read("min_p", _NUMBER, 0.0)),
        repetition_penalty=float(read("repetition_penalty", _NUMBER, 1.0)),
        presence_penalty=float(read("presence_penalty", _NUMBER, 0.0)),
        frequency_penalty=float(read("frequency_penalty", _NUMBER, 0.0)),
        logit_bias=_logit_bias(body.get("logit_bias") or {}),
        seed=read("seed", _INT),
        n=n,
        stop=_stop(body.get("stop") or []),
        stop_ids=_stop_ids(body.get("stop_token_ids") or []),
        ignore_eos=bool(read("ignore_eos", _BOOL)),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _value(body: dict[str, Any], name: str, kinds: tuple[type, ...], default: Any = None) -> Any:
    value = body.get(name)
    if value is not None and type(value) not in kinds:  # True is an int, but no number of tokens
        raise InputError(f'"{name}" must be {_SAID[kinds]}, not {_shown(value)}')
    return default if value is None else value


def _logprobs(url: str, body: dict[str, Any]) -> int | None:
    """How many alternatives: a completion says it at once, a chat in two steps."""
    if url == COMPLETIONS:
        return None if body.get("logprobs") is False else _value(body, "logprobs", _INT)
    top = _value(body, "top_logprobs", _INT, 0)
    if _value(body, "logprobs", _BOOL):
        return top
    if top:
        raise InputError('"top_logprobs" needs "logprobs": true')
    return None


def _logit_bias(bias: Any) -> dict[int, float]:
    """Token ids are strings here, as all names of a JSON object are."""
    if not isinstance(bias, dict) or not all(
        key.isascii() and key.isdigit() and type(value) in _NUMBER for key, value in bias.items()
    ):
        raise InputError('"logit_bias" must be an object of token ids and numbers')
    return {int(key): float(value) for key, value in bias.items()}


def _stop(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f'"stop" must be text or a list of texts, not {_shown(stop)}')
    return tuple(texts)


def _stop_ids(ids: Any) -> tuple[int, ...]:
    if not _is_ids(ids):
        raise InputError(f'"stop_token_ids" must be a list of token ids, not {_shown(ids)}')
    return tuple(ids)


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]
