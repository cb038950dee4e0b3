"""Batch files: requests in the OpenAI batch form, answers written as they finish.

A line of the input is {"custom_id", "method", "url", "body"}; a line of the output is {"id",
"custom_id", "response": {"status_code", "request_id", "body"}, "error"}. A request that cannot be
answered becomes a line with an `error`, and the others go on.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from kvjax.errors import InputError
from kvjax.infer.answers import Completion
from kvjax.infer.llm import LLM, Prompt
from kvjax.infer.sampling import SamplingParams

__all__ = ["BatchRequest", "BatchSummary", "answered_ids", "read_requests", "run_batch"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_OURS = b'{"id": "batch_req_'  # how every line of an output begins

# What a body may say beside what is used; the value, where one stands, is the only one allowed.
_IGNORED = {"user", "metadata", "store", "model", "service_tier", "stream_options"}
_NEUTRAL: dict[str, Any] = {
    "n": 1, "best_of": 1, "stream": False, "echo": False, "logprobs": False, "top_logprobs": 0,
    "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "stop": [], "suffix": "",
    "tools": [], "response_format": {"type": "text"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """One line of a batch file; `error` says why it cannot be answered."""

    line: int
    custom_id: str | None
    url: str = ""
    prompt: Prompt = ""
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    error: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSummary:
    """What a batch came to. Requests that were answered by an earlier run count as `resumed`."""

    requests: int
    resumed: int
    failed: int
    prompt_tokens: int
    output_tokens: int


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
            message = f"line {number}: custom_id {request.custom_id!r} stands on an earlier line"
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
        prompt, params = _parse_body(record.get("url"), record.get("body"))
        return BatchRequest(number, custom_id, record["url"], prompt, params)
    except ValueError as e:  # not JSON, not UTF-8, or an InputError
        return BatchRequest(number, custom_id, error=f"line {number}: {e}")


def _parse_body(url: Any, body: Any) -> tuple[Prompt, SamplingParams]:
    if url not in (CHAT, COMPLETIONS):
        raise InputError(f"url {url!r} is not supported: use {CHAT} or {COMPLETIONS}")
    if not isinstance(body, dict):
        raise InputError('"body" must be an object')
    used = {"messages" if url == CHAT else "prompt", "max_tokens", "temperature", "top_p", "seed",
            "max_completion_tokens", "ignore_eos"}  # fmt: skip
    for name, value in body.items():
        neutral = value is None or (name in _NEUTRAL and value == _NEUTRAL[name])
        if name not in used | _IGNORED and not neutral:
            raise InputError(f'"{name}": {json.dumps(value)[:60]} is not supported: leave it out')
    return _parse_prompt(url, body), _parse_params(body)


def _parse_prompt(url: str, body: dict[str, Any]) -> Prompt:
    if url == CHAT:
        messages = body.get("messages")
        if not (isinstance(messages, list) and messages):
            raise InputError('"messages" must be a list of {"role", "content"}')
        for message in messages:
            if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
                raise InputError('every message must be an object with a "role"')
        return messages
    prompt = body.get("prompt")
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    if not isinstance(prompt, str):
        raise InputError('"prompt" must be text or a list of token ids')
    return prompt


def _parse_params(body: dict[str, Any]) -> SamplingParams:
    def number(name: str, default: Any, kinds: tuple[type, ...]) -> Any:
        value = body.get(name)
        if value is not None and type(value) not in kinds:
            raise InputError(f'"{name}" must be a number, not {json.dumps(value)[:60]}')
        return default if value is None else value

    # The form's own default draws from the model's distribution.
    return SamplingParams(
        max_tokens=number("max_completion_tokens", number("max_tokens", None, (int,)), (int,)),
        temperature=float(number("temperature", 1.0, (int, float))),
        top_p=float(number("top_p", 1.0, (int, float))),
        seed=number("seed", None, (int,)),
        ignore_eos=body.get("ignore_eos") is True,
    )


def run_batch(
    llm: LLM,
    requests: list[BatchRequest],
    output: Path,
    *,
    model: str,
    answered: Collection[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, failed: None,
) -> BatchSummary:
    """Answers requests and appends each answer to a file when it is finished.

    Answers that the file already holds are kept and their requests skipped, so a run that was cut
    short goes on where it was; failed ones are tried again.

    Args:
        llm: answers.
        requests: from `read_requests`.
        output: written line by line and flushed.
        model: the name that the answers carry.
        answered: what `answered_ids` says of the output; None: it is asked.
        progress: called with the requests done and failed so far.

    Raises:
        InputError: the file cannot be written, or holds another model's answers.
    """
    answered = answered_ids(output, model) if answered is None else answered
    todo = [request for request in requests if request.custom_id not in answered]
    resumed = len(requests) - len(todo)
    failed = prompt_tokens = output_tokens = 0
    try:
        with output.open("a", encoding="utf-8") as file:
            for done, (request, completion, error) in enumerate(_answer(llm, todo), 1):
                if completion is not None:
                    prompt_tokens += completion.prompt_tokens
                    output_tokens += len(completion.token_ids)
                failed += completion is None
                _write(file, _record(request, completion, error, model))
                progress(resumed + done, failed)
    except OSError as e:
        raise InputError(f"{output}: {e.strerror}: what is written so far is kept") from e
    return BatchSummary(
        requests=len(requests), resumed=resumed, failed=failed, prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )  # fmt: skip


def answered_ids(output: Path, model: str) -> set[str]:
    """The ids that a file has answers for; what an interrupted or failed run left is removed.

    Raises:
        InputError: the file cannot be written, or holds anything but this model's answers.
    """
    try:
        *lines, torn = output.read_bytes().split(b"\n") if output.exists() else [b""]
        if torn and not torn.startswith(_OURS[: len(torn)]):
            raise _not_ours(output, len(lines) + 1)
        ids = [_answered_id(output, i, line, model) for i, line in enumerate(lines, 1)]
        kept = {i: line for i, line in zip(ids, lines, strict=True) if i is not None}
        rewritten = output.with_name(output.name + ".tmp")
        rewritten.write_bytes(b"".join(line + b"\n" for line in kept.values()))
        rewritten.replace(output)
    except OSError as e:
        raise InputError(f"{output}: {e.strerror}: give a file that can be written") from e
    return set(kept)


def _answered_id(output: Path, number: int, line: bytes, model: str) -> str | None:
    """The id of an answered request, or None for one that failed."""
    try:
        record = json.loads(line)
        custom_id, response = record["custom_id"], record["response"]
        other = None if response is None else response["body"]["model"]
    except (ValueError, KeyError, TypeError):
        raise _not_ours(output, number) from None
    if other is not None and other != model:
        raise InputError(
            f"{output}: holds answers of model {other!r}, not {model!r}: "
            "give another output file or delete it"
        )
    return None if other is None else custom_id


def _not_ours(output: Path, line: int) -> InputError:
    return InputError(f"{output}: line {line} is no answer of a batch: give another output file")


def _answer(
    llm: LLM, requests: list[BatchRequest]
) -> Iterator[tuple[BatchRequest, Completion | None, str | None]]:
    """Answers in the order in which they finish, what cannot be answered first."""
    good: list[BatchRequest] = []
    for request in requests:
        error = request.error
        if error is None:
            try:
                tokens = llm.check(request.prompt)
                good.append(dataclasses.replace(request, prompt=tokens))
                continue
            except InputError as e:
                error = f"line {request.line}: {e}"
        yield request, None, error
    # A request's own line is its default seed: it stays the same when a run is resumed.
    params = [
        dataclasses.replace(r.params, seed=r.line if r.params.seed is None else r.params.seed)
        for r in good
    ]
    for chunk in llm.stream([r.prompt for r in good], params):
        if chunk.completion is not None:
            yield good[chunk.index], chunk.completion, None


def _record(
    request: BatchRequest, completion: Completion | None, error: str | None, model: str
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": f"batch_req_{request.line}", "custom_id": request.custom_id, "response": None,
        "error": None,
    }  # fmt: skip
    if completion is None:
        record["error"] = {"code": "invalid_request", "message": error, "line": request.line}
        return record
    choice: dict[str, Any] = {"index": 0, "finish_reason": completion.finish_reason}
    if request.url == CHAT:
        choice["message"] = {"role": "assistant", "content": completion.text}
    else:
        choice["text"] = completion.text
    generated = len(completion.token_ids)
    body = {
        "id": f"req_{request.line}",
        "object": "chat.completion" if request.url == CHAT else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": completion.prompt_tokens + generated,
        },
    }
    record["response"] = {"status_code": 200, "request_id": f"req_{request.line}", "body": body}
    return record


def _write(file: TextIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())
