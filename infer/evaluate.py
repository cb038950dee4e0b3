"""`kvjax eval`: what is lost and what is saved when a cache is compressed.

A batch of prompts is computed once; then each policy under each budget takes its part away, and the
answers are written from what is left. Every answer is a line of a file, so that an evaluation that
was interrupted goes on, and what was answered is not answered again.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import CacheConfig
from kvjax.errors import InputError
from kvjax.infer.evaluate_metrics import METRICS
from kvjax.infer.evaluate_policies import read_policy
from kvjax.infer.evaluate_programs import (
    Prefilled,
    Reading,
    Sizes,
    answer,
    choose,
    prefill,
    read_question,
)
from kvjax.infer.evaluate_programs import remove as remove_rest
from kvjax.infer.evaluate_suite import PROTOCOLS, TAGS, Prompt, Suite
from kvjax.infer.llm import find_model
from kvjax.models import hf
from kvjax.models.decoder import DecoderConfig
from kvjax.models.task_classifier import load_classifier
from kvjax.models.tokenizer import Tokenizer
from kvjax.select import MPCache, Policy, View, parse_budget

__all__ = ["FULL", "Batch", "Model", "arrays", "combine", "evaluate", "read_answers"]

FULL = "full"
"""The name of the policy that keeps everything, and of its budget."""

Key = tuple[str, int, str, str, str, str]
Progress = Callable[[int, int], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder, ready to be evaluated."""

    name: str
    graph: Any
    params: Any
    config: DecoderConfig
    tokenizer: Tokenizer

    @staticmethod
    def load(name: str, dtype: str | None = None) -> "Model":
        """Loads a model as `LLM.load` does, but without an engine.

        Raises:
            InputError: it cannot be used.
        """
        folder = find_model(name)
        graph, params, config = hf.load(folder, dtype=dtype)
        tokenizer = Tokenizer.load(folder)
        return Model(name=name, graph=graph, params=params, config=config, tokenizer=tokenizer)


class Combination(NamedTuple):
    """A policy under a budget."""

    name: str
    policy: Policy | None
    budget: str


class Batch(NamedTuple):
    """Prompts of one task and length as arrays; the last one is repeated to fill the rows."""

    prompts: tuple[Prompt, ...]
    tokens: np.ndarray  # int32[B, T]
    length: np.ndarray  # int32[B]
    question: np.ndarray  # int32[B, X]
    asked: np.ndarray  # int32[B]
    most: np.ndarray  # int32[B]
    needles: np.ndarray  # bool[B, S]
    number: np.ndarray  # int32[B]


def evaluate(
    model: Model, suite: Suite, answers: Path, progress: Progress = lambda done, total: None
) -> list[dict[str, Any]]:
    """Answers what is not answered yet, and appends it to a file.

    Args:
        model: which.
        suite: of what.
        answers: a file of JSON lines, one an answer; it may have lines already.
        progress: called with how many answers are there, and of how many.

    Returns:
        The lines of this suite, those of an earlier run included.

    Raises:
        InputError: something of the suite cannot be used, or stands in the file.
    """
    combinations = combine(suite)
    if (longest := max(suite.lengths)) > model.config.max_positions:
        raise InputError(
            f"{longest} tokens: {model.name} was made for {model.config.max_positions}; "
            "give shorter --lengths"
        )
    classify = _classifier(model) if suite.tags == "classifier" else None
    lines = {_key(line): line for line in read_answers(answers)}
    wanted = [c.name for c in combinations], [c.budget for c in combinations]
    total = len(suite.tasks) * len(suite.lengths) * suite.prompts * len(suite.protocols)
    total *= len(combinations)
    done: dict[Key, dict[str, Any]] = {}
    with answers.open("a", encoding="utf-8") as file:
        for prompts in _batches(model, suite):
            sizes = _sizes(model, suite, prompts, combinations)
            tags = _tags(suite.tags, prompts, classify)
            for protocol in suite.protocols:
                keys = [
                    (p.task, p.length, p.name, protocol, *pair)
                    for p in prompts
                    for pair in zip(*wanted, strict=True)
                ]
                missing = [key for key in keys if key not in lines]
                for line in _answer(
                    model, sizes[protocol], prompts, protocol, combinations, missing, tags
                ):
                    lines[_key(line)] = line
                    _append(file, line)
                done.update({key: lines[key] for key in keys})
                progress(len(done), total)
    return list(done.values())


def combine(suite: Suite) -> list[Combination]:
    """Each policy under each budget; keeping everything has none.

    Raises:
        InputError: a policy, a budget or a protocol that there is not.
    """
    if unknown := set(suite.protocols) - set(PROTOCOLS):
        raise InputError(f"no protocols {', '.join(unknown)}: use {' or '.join(PROTOCOLS)}")
    if suite.tags not in TAGS:
        raise InputError(f"no tags {suite.tags!r}: use one of {', '.join(TAGS)}")
    for budget in suite.budgets:
        parse_budget(budget)
    suffix = "" if suite.tags == "true" else f"@{suite.tags}"
    found = []
    for name in suite.policies:
        policy = read_policy(name)
        budgets = [FULL] if policy is None else suite.budgets
        name = name if policy is None else name + suffix
        found += [Combination(name, policy, budget) for budget in budgets]
    return found


def read_answers(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of answers; one that was cut off is left out.

    Raises:
        InputError: something else stands in it.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # interrupted while it was written
        path.write_text(whole, encoding="utf-8")
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            _key(record)
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path}, line {number}: no answer of `kvjax eval`: remove it") from e
        yield record


def _key(line: dict[str, Any]) -> Key:
    return (
        line["task"], line["length"], line["name"], line["protocol"], line["policy"],
        line["budget"],
    )  # fmt: skip


def _append(file: TextIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def _batches(model: Model, suite: Suite) -> Iterator[list[Prompt]]:
    for length, task in itertools.product(suite.lengths, suite.tasks):
        prompts = suite.make(model.tokenizer, task, length, suite.seed, suite.prompts)
        while some := list(itertools.islice(prompts, suite.rows)):
            yield some


def _sizes(
    model: Model, suite: Suite, prompts: Sequence[Prompt], combinations: Iterable[Combination]
) -> dict[str, Sizes]:
    """Static sizes, rounded up so that batches share them."""
    longest = max(len(p.context) + len(p.question) for p in prompts)
    observed = [c.policy.observed if c.policy else 1 for c in combinations]
    sizes = Sizes(
        rows=suite.rows,
        prompt=_round(longest, 128),
        question=0,
        answer=_round(max(_most(model, p) for p in prompts), 64),
        page_size=suite.page_size,
        observed=-1 if -1 in observed else max(1, *observed),
    )
    asked = _round(max(len(p.question) for p in prompts), 32)
    return {"A": sizes, "B": dataclasses.replace(sizes, question=asked)}


def _round(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _most(model: Model, prompt: Prompt) -> int:
    """The most tokens of an answer: a longer one than the longest right one is wrong anyway."""
    if prompt.most_tokens:
        return prompt.most_tokens
    texts = (model.tokenizer.encode(text, add_special=False) for text in prompt.answers)
    return max(len(ids) for ids in texts) + 1


def arrays(model: Model, sizes: Sizes, prompts: Sequence[Prompt], protocol: str) -> Batch:
    """Prompts as the arrays of a batch."""
    rows, slots = sizes.rows, sizes.cache(model.config).pages_per_row * sizes.page_size
    filled = [*prompts, *[prompts[-1]] * (rows - len(prompts))]
    batch = Batch(
        tuple(filled),
        np.zeros((rows, sizes.prompt), np.int32),
        np.zeros(rows, np.int32),
        np.zeros((rows, max(1, sizes.question)), np.int32),
        np.zeros(rows, np.int32),
        np.asarray([_most(model, prompt) for prompt in filled], np.int32),
        np.zeros((rows, slots), bool),
        np.asarray([_number(prompt) for prompt in filled], np.int32),
    )
    for row, prompt in enumerate(filled):
        ids, question = prompt.context, prompt.question
        if protocol == "A":
            ids = np.concatenate([ids, question])
        else:
            batch.question[row, : len(question)], batch.asked[row] = question, len(question)
        batch.tokens[row, : len(ids)], batch.length[row] = ids, len(ids)
        for start, end in prompt.needles:
            batch.needles[row, start:end] = True
    return batch


def _number(prompt: Prompt) -> int:
    """What a prompt's random choices depend on: its name, the same in every run."""
    return int.from_bytes(prompt.name.encode()[-4:], "big") % 2**31


def _answer(
    model: Model, sizes: Sizes, prompts: Sequence[Prompt], protocol: str,
    combinations: Sequence[Combination], missing: Sequence[Key], tags: np.ndarray | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The lines of a batch that are missing."""
    if not missing:
        return
    batch = arrays(model, sizes, prompts, protocol)
    start = time.perf_counter()
    filled = prefill(model.graph, sizes, model.params, batch.tokens, batch.length)
    jax.block_until_ready(filled)
    prefill_seconds = time.perf_counter() - start
    view = View(
        pool=filled.pool, table=filled.table, seen=filled.seen, task=_filled(tags, sizes.rows),
        number=jnp.asarray(batch.number), needles=jnp.asarray(batch.needles),
        inverse_frequencies=_frequencies(model.config),
    )  # fmt: skip
    wanted = set(missing)
    for combination in combinations:
        pair = combination.name, combination.budget
        rows = [(p.task, p.length, p.name, protocol, *pair) in wanted for p in prompts]
        if any(rows):
            figures = _run(model, sizes, batch, protocol, filled, view, combination)
            figures["prefill_seconds"] = [prefill_seconds / len(prompts)] * sizes.rows
            lines = _lines(batch.prompts[: len(prompts)], protocol, combination, figures)
            yield from (line for line, use in zip(lines, rows, strict=True) if use)


def _classifier(model: Model) -> Callable[[np.ndarray], int]:
    return load_classifier(find_model(model.name) / "task_classifier.safetensors").classify


def _tags(
    tags: str, prompts: Sequence[Prompt], classify: Callable[[np.ndarray], int] | None
) -> np.ndarray | None:
    """The prompts' tasks as a policy is told them, int32[n]."""
    if tags == "none":
        return None
    if classify is not None:
        whole = (np.concatenate([prompt.context, prompt.question]) for prompt in prompts)
        return np.asarray([classify(tokens) for tokens in whole], np.int32)
    return np.asarray([int(p.gathers != (tags == "wrong")) for p in prompts], np.int32)


def _filled(tags: np.ndarray | None, rows: int) -> jax.Array | None:
    return None if tags is None else jnp.asarray(np.resize(tags, rows))


def _frequencies(config: DecoderConfig) -> jax.Array:
    return jnp.asarray(config.rope.inverse_frequencies(config.head_dim))


def _run(
    model: Model, sizes: Sizes, batch: Batch, protocol: str, filled: Prefilled, view: View,
    combination: Combination,
) -> dict[str, Any]:  # fmt: skip
    """Compresses a batch's cache and writes its answers; figures by row."""
    cache = sizes.cache(model.config)
    page_bytes = cache.page_bytes(jax.default_backend())
    whole = -(-batch.length // sizes.page_size) * cache.num_layers * cache.num_kv_heads
    table, held = filled.table, whole
    recall, error = np.ones(sizes.rows), np.zeros(sizes.rows)
    reading, tokens = None, None
    start = time.perf_counter()
    if combination.policy is None:
        pool = jax.tree.map(jnp.copy, filled.pool)  # the answer writes into it
    else:
        token_bytes = page_bytes // sizes.page_size * cache.num_layers * cache.num_kv_heads
        budget = parse_budget(combination.budget)
        tokens = budget.tokens(batch.length, token_bytes, sizes.page_size)
        choice = choose(combination.policy, view, jnp.asarray(tokens))
        evicted, kept = remove_rest(
            sizes, combination.policy.whole_pages, filled.pool, table, choice.keep
        )
        pool, table, held = evicted.pool, evicted.table, np.asarray(kept)
        recall, error = np.asarray(choice.recall), np.asarray(choice.error)
        if isinstance(combination.policy, MPCache):
            width = combination.policy.width(int(tokens.max()), sizes.page_size)
            reading = Reading(combination.policy, width)
    select_seconds = time.perf_counter() - start
    table, token = _narrow(sizes, table), filled.token
    start = time.perf_counter()
    shared = model.graph, sizes
    if protocol == "B":
        pool, table, token = read_question(
            *shared, model.params, pool, table, batch.question, batch.asked
        )
    stops = model.tokenizer.eos_ids
    reads = (None, None) if reading is None else (reading, jnp.asarray(tokens))
    pool, written = answer(*shared, stops, model.params, pool, table, token, batch.most, *reads)
    written = np.asarray(written)
    seconds = time.perf_counter() - start
    return {
        "answer": [_text(model, column) for column in written.T],
        "bytes": (held * page_bytes).tolist(),
        "bytes_read": _bytes_read(cache, held, reading, tokens, page_bytes).tolist(),
        "bytes_full": (whole * page_bytes).tolist(),
        "recall": recall.tolist(),
        "attention_error": error.tolist(),
        "select_seconds": [select_seconds / sizes.rows] * sizes.rows,
        "tokens_per_second": [float((written >= 0).sum()) / seconds] * sizes.rows,
    }


def _bytes_read(
    cache: CacheConfig, held: np.ndarray, reading: Reading | None, tokens: np.ndarray | None,
    page_bytes: int,
) -> np.ndarray:  # fmt: skip
    """Bytes that an answer's first step reads of each row's cache: of what is chosen, and of what
    it is chosen by.
    """  # fmt: skip
    if reading is None or tokens is None:
        return held * page_bytes
    heads = cache.num_layers * cache.num_kv_heads
    extra = 2 * reading.policy.extra
    chosen = np.minimum((np.maximum(tokens // cache.page_size, 1) + extra) * heads, held)
    vector = cache.head_dim * np.dtype(cache.dtype).itemsize
    return chosen * page_bytes + held * reading.policy.vectors * vector


def _narrow(sizes: Sizes, table: Any) -> Any:
    """The table cut to as many entries as are used, in powers of two, so that little compiles."""
    most = table.pages.shape[-1]
    need = int(jnp.max(-(-table.length // sizes.page_size))) + sizes.spare
    width = min(most, 1 << max(0, need - 1).bit_length())
    return dataclasses.replace(table, pages=table.pages[..., :width])


def _text(model: Model, tokens: np.ndarray) -> str:
    ids = [token for token in tokens.tolist() if token >= 0]
    return model.tokenizer.decode([i for i in ids if i not in model.tokenizer.eos_ids])


def _lines(
    prompts: Sequence[Prompt], protocol: str, combination: Combination, figures: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for row, prompt in enumerate(prompts):
        own = {name: values[row] for name, values in figures.items()}
        score = METRICS[prompt.metric](own["answer"], prompt.answers)
        yield {
            "task": prompt.task,
            "length": prompt.length,
            "name": prompt.name,
            "protocol": protocol,
            "policy": combination.name,
            "budget": combination.budget,
            "score": score,
            "answer": own.pop("answer"),
            "right": list(prompt.answers),
            "depth": None if prompt.depth is None else round(prompt.depth, 4),
            **{k: round(v, 6) if isinstance(v, float) else v for k, v in own.items()},
        }
