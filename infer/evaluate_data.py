"""Prompts from files: JSON lines as LongBench and RULER publish them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.errors import InputError
from kvjax.infer.evaluate_metrics import METRICS
from kvjax.infer.evaluate_suite import Make, Prompt, split_chat
from kvjax.models.tokenizer import Tokenizer

__all__ = ["make_from_files", "task_names"]

# RULER's own names of tasks whose answer is one of several texts; the others want all of them.
_RULER_ANY = ("qa",)


def task_names(files: Sequence[Path]) -> tuple[str, ...]:
    """One task a file, named as it is."""
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file: give JSON lines of LongBench or RULER")
    return tuple(file.stem for file in files)


def make_from_files(files: Sequence[Path], max_tokens: int) -> Make:
    """A maker of prompts from files; the length is the longest prompt, longer ones are cut.

    A LongBench line has "context", "input" and "answers" (and may have "all_classes"), a RULER
    line "input" and "outputs"; a line may name its own "metric", "context" and "question".

    Args:
        files: one a task.
        max_tokens: of an answer.
    """
    by_name = dict(zip(task_names(files), files, strict=True))

    def make(
        tokenizer: Tokenizer, task: str, length: int, seed: int, count: int
    ) -> Iterator[Prompt]:
        del seed  # what a file holds is what is asked
        for number, record in enumerate(_read(by_name[task])):
            if number == count:
                return
            where = f"{by_name[task]}, line {number + 1}"
            yield _prompt(tokenizer, task, length, str(number), record, max_tokens, where)

    return make


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError as e:
                raise InputError(f"{path}, line {number}: no JSON: {e}") from e
            if not isinstance(record, dict):
                raise InputError(f"{path}, line {number}: no JSON object")
            yield record


def _prompt(
    tokenizer: Tokenizer, task: str, length: int, name: str, record: dict[str, Any],
    max_tokens: int, where: str,
) -> Prompt:  # fmt: skip
    answers = record.get("answers", record.get("outputs"))
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(x, str) for x in answers) or not answers:
        raise InputError(f'{where}: no "answers" (LongBench) or "outputs" (RULER)')
    ruler = "outputs" in record
    context, question = record.get("context"), record.get("question", record.get("input", ""))
    if context is None:  # RULER has one text; its last paragraph is the question
        context, _, question = str(record.get("input", "")).rpartition("\n")
        context += "\n"
    if not context.strip() or not isinstance(question, str):
        raise InputError(f'{where}: no "context", or no "input" of a context and a question')
    of_all = "contains_any" if task.startswith(_RULER_ANY) else "contains"
    metric = record.get("metric", of_all if ruler else "f1")
    if metric not in METRICS:
        raise InputError(f"{where}: no metric {metric!r}: use one of {', '.join(METRICS)}")
    joined = context if context.endswith("\n") else context + "\n\n"
    first, rest = split_chat(tokenizer, joined, question)
    most = length - len(rest) - max_tokens
    if most < 2:
        raise InputError(f"{where}: {length} tokens do not hold its question: raise --lengths")
    if len(first) > most:  # LongBench's way: both ends stay
        first = _ends(first, most)
    return Prompt(
        name=name, task=task, length=length, context=first, question=rest, answers=tuple(answers),
        metric=metric, most_tokens=max_tokens,
    )  # fmt: skip


def _ends(ids: np.ndarray, most: int) -> np.ndarray:
    return np.concatenate([ids[: most // 2], ids[len(ids) - (most - most // 2) :]])
