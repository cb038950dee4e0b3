"""Batches: requests of a file, answered, each answer written as it finishes.

A request that cannot be answered becomes a line with an `error`, and the others go on. What is
written is never written again: a run that was cut short goes on where it was.
"""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

from kvjax.errors import InputError
from kvjax.infer.answers import Completion
from kvjax.infer.batch_form import BatchRequest
from kvjax.infer.batch_output import BatchOutput
from kvjax.infer.batch_records import TokenNames, answer_record, error_record
from kvjax.infer.llm import LLM
from kvjax.infer.sampling import SamplingParams
from kvjax.infer.scores import join, scoring

__all__ = ["BatchSummary", "run_batch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSummary:
    """What a batch has come to.

    Attributes:
        requests: all of the file.
        resumed: of them, those that an earlier run has answered.
        failed: those that cannot be answered.
        failed_ids: of them, those whose custom_id could be read.
        prompt_tokens, output_tokens: of the requests answered by this run.
    """

    requests: int
    resumed: int = 0
    failed: int = 0
    failed_ids: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A request that can be answered: its tokens, and what is asked of the engine."""

    request: BatchRequest
    tokens: tuple[int, ...]
    params: SamplingParams


def run_batch(
    llm: LLM,
    requests: Sequence[BatchRequest],
    output: BatchOutput,
    progress: Callable[[int, BatchSummary], object] = lambda done, summary: None,
) -> BatchSummary:
    """Answers the requests that the output has no answer of, and appends theirs.

    Args:
        llm: answers.
        requests: from `read_requests`.
        output: from `open_output`.
        progress: called after each line with the requests that are done, earlier runs' and failed
            ones included, and the summary so far.

    Raises:
        InputError: the output cannot be written any more.
    """
    todo = [request for request in requests if request.custom_id not in output.answered]
    summary = BatchSummary(requests=len(requests), resumed=len(requests) - len(todo))
    ready: list[_Ready] = []
    done = summary.resumed
    for request in todo:
        try:
            ready.append(_prepare(llm, request))
        except InputError as e:
            output.append(error_record(request, f"line {request.line}: {e}"))
            summary = _with_failure(summary, request)
            progress(done := done + 1, summary)
    named = {ids: TokenNames(llm.tokenizer, ids=ids) for ids in (False, True)}
    with closing(_answers(llm, ready)) as answers:
        for task, completions in answers:
            names = named[task.request.token_ids]
            output.append(
                answer_record(task.request, task.tokens, completions, names, output.model)
            )
            summary = _with_answer(summary, task, completions)
            progress(done := done + 1, summary)
    return summary


def _prepare(llm: LLM, request: BatchRequest) -> _Ready:
    """Finds a request's tokens.

    Raises:
        InputError: it can never be answered.
    """
    if request.error is not None:
        raise InputError(request.error)
    if request.continuation is not None:
        tokens, start = join(llm.tokenizer, request.prompt, request.continuation)
        params = scoring(start)
        return _Ready(request, llm.check(tokens, params), params)
    params = request.params
    if params.seed is None:
        # From the request's own line, so that it stays the same when a run is resumed; times n,
        # so that lines which draw several answers do not draw each other's.
        params = dataclasses.replace(params, seed=request.line * params.n % 2**32)
    tokens = llm.check(request.prompt, params)
    capacity = llm.engine.planner.capacity
    if len(tokens) + (params.max_tokens or 0) > capacity + 1:  # the last one is not computed
        raise InputError(
            f"{len(tokens)} tokens of the prompt and {params.max_tokens} to generate, but a "
            f"sequence holds {capacity}: lower max_tokens, or raise the maximum length or the KV "
            "memory"
        )
    return _Ready(request, tokens, params)


def _answers(
    llm: LLM, ready: Sequence[_Ready]
) -> Generator[tuple[_Ready, list[Completion]], None, None]:
    """The requests with all their answers, in the order in which they finish."""
    found: dict[int, dict[int, Completion]] = {}
    for chunk in llm.stream([task.tokens for task in ready], [task.params for task in ready]):
        if chunk.completion is None:
            continue
        choices = found.setdefault(chunk.index, {})
        choices[chunk.choice] = chunk.completion
        if len(choices) == ready[chunk.index].params.n:
            del found[chunk.index]
            yield ready[chunk.index], [choices[i] for i in sorted(choices)]


def _with_failure(summary: BatchSummary, request: BatchRequest) -> BatchSummary:
    known = request.custom_id is not None
    return dataclasses.replace(
        summary, failed=summary.failed + 1, failed_ids=summary.failed_ids + known
    )


def _with_answer(
    summary: BatchSummary, task: _Ready, completions: Sequence[Completion]
) -> BatchSummary:
    generated = sum(len(completion.token_ids) for completion in completions)
    return dataclasses.replace(
        summary,
        prompt_tokens=summary.prompt_tokens + len(task.tokens),
        output_tokens=summary.output_tokens + generated,
    )
