"""The public API: a language model that answers prompts."""

import dataclasses
import importlib.resources
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from kvjax.cache import CacheConfig
from kvjax.errors import InputError
from kvjax.infer.engine import Engine
from kvjax.infer.sampling import SamplingParams
from kvjax.models import hf
from kvjax.models.tokenizer import TextStream, Tokenizer, named_ids
from kvjax.plan import Grid, Request, Sampled

__all__ = ["BUILT_IN_MODELS", "LLM", "Chunk", "Completion", "Prompt", "find_model"]

BUILT_IN_MODELS = ("tiny",)

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or the messages of a chat ({"role": ..., "content": ...})."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer.

    Attributes:
        text: without special tokens.
        token_ids: what was generated, the end token included.
        finish_reason: "stop" or "length".
        prompt_tokens: how many tokens the prompt had.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of an answer as it is generated.

    Attributes:
        index: which prompt of the call.
        text: what is new; may be empty where a token ends within a character.
        completion: the whole answer, with its last piece.
    """

    index: int
    text: str
    completion: Completion | None


def find_model(model: str | Path) -> Path:
    """The folder of a model: a path, a finished run of `kvjax train lm`, or a built-in name."""
    folder = Path(model)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    if str(model) in BUILT_IN_MODELS:
        return Path(str(importlib.resources.files("kvjax.models"))) / str(model)
    if folder.exists():
        return folder  # what is missing in it is said by whoever reads it
    raise InputError(
        f"no model {str(model)!r}: give a folder with config.json and *.safetensors, "
        f"or one of the built-in models: {', '.join(BUILT_IN_MODELS)}"
    )


class LLM:
    """A decoder, its tokenizer and an engine.

    >>> llm = LLM.load("tiny")
    >>> llm.generate("The code of", SamplingParams(max_tokens=4))[0].finish_reason
    'length'
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None, eos_ids: Iterable[int] = ()
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.eos_ids: frozenset[int] = frozenset(eos_ids)
        self._next_id = 0

    @staticmethod
    def load(
        model: str | Path,
        *,
        dtype: str | None = None,
        kv_memory: int | None = None,
        max_length: int | None = None,
        max_rows: int = 64,
        page_size: int = 16,
        token_budget: int = 512,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "LLM":
        """Loads a model.

        Args:
            model: a Hugging Face folder (config.json, tokenizer.json, *.safetensors), a finished
                run of `kvjax train lm`, or the name of a built-in model. Without a tokenizer.json
                prompts are token ids, and the texts of answers are empty.
            dtype: "float32" or "bfloat16"; None: as stored.
            kv_memory: bytes for the KV cache, in device layout; None: most of what the device has
                left, on the CPU what `max_rows` rows of `max_length` need but at most 1 GiB.
            max_length: the longest sequence, prompt and answer together, in tokens; None: what the
                model was made for, but at most 8192.
            max_rows: requests that are answered at the same time.
            page_size: tokens of a page.
            token_budget: the most tokens that a step computes, prompts' chunks included.
            mesh: splits weights and heads over its devices, see `kvjax.sharding`; None: the default
                device.

        Raises:
            InputError: something in the folder cannot be used, or the memory is too little.
        """
        folder = find_model(model)
        hf.read_config(folder)  # first of all: the plainest thing that may be wrong
        tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
        eos_ids = tokenizer.eos_ids if tokenizer else named_ids(folder, "eos")
        graph, params, config = hf.load(folder, dtype=dtype, mesh=mesh)
        length = min(max_length or 8192, config.max_positions)
        grid = _grid(length, max_rows, page_size, token_budget)
        cache = CacheConfig(
            num_pages=1, page_size=page_size, num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, max_rows=max_rows,
            pages_per_row=grid.pages_per_row, dtype=config.dtype,
        )  # fmt: skip
        cache = dataclasses.replace(cache, num_pages=_num_pages(cache, kv_memory))
        return LLM(Engine(graph, params, config, cache, grid, mesh), tokenizer, eos_ids)

    def generate(
        self, prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """Answers prompts, many at a time; equal beginnings are computed once.

        Args:
            prompts: one prompt or several: text, token ids or chat messages.
            params: for all, or one for each.

        Returns:
            The completions, in the order of the prompts.

        Raises:
            InputError: a prompt cannot be answered; none was begun.
        """
        done = {c.index: c.completion for c in self.stream(prompts, params) if c.completion}
        return [done[index] for index in sorted(done)]

    def stream(
        self, prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Chunk]:  # fmt: skip
        """Like `generate`, but yields every piece of every answer as soon as it is there.

        Closing the iterator before its end gives up what is unfinished. One at a time: the engine
        runs while it is read.
        """
        many = _as_prompts(prompts)
        if isinstance(params, Sequence):
            each = list(params)
            if len(each) != len(many):
                raise InputError(f"{len(each)} sampling parameters for {len(many)} prompts")
        else:
            each = [params or SamplingParams()] * len(many)
        requests = [
            self._request(prompt, p, index)
            for index, (prompt, p) in enumerate(zip(many, each, strict=True))
        ]
        return self._run(requests)

    def check(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt.

        Raises:
            InputError: it can never be answered.
        """
        ids = tuple(self._tokens(prompt))
        capacity = self.engine.planner.capacity
        if not ids:
            raise InputError("the prompt is empty: give it at least one token")
        if len(ids) > capacity:
            raise InputError(
                f"the prompt has {len(ids)} tokens but a sequence holds {capacity}: "
                "shorten it, or raise the maximum length or the KV memory"
            )
        last = self.engine.model.vocab_size - 1
        if min(ids) < 0 or max(ids) > last:
            raise InputError(f"the prompt has token ids outside of 0..{last}")
        return ids

    def _tokens(self, prompt: Prompt) -> Sequence[int]:
        is_chat = bool(prompt) and isinstance(prompt[0], Mapping)
        if not isinstance(prompt, str) and not is_chat:
            return prompt  # pyright: ignore[reportReturnType]
        if self.tokenizer is None:
            raise InputError("the model's folder has no tokenizer.json: give token ids, or add it")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat(prompt)  # pyright: ignore[reportArgumentType]

    def _request(self, prompt: Prompt, params: SamplingParams, index: int) -> Request:
        self._next_id += 1
        return Request(
            id=self._next_id,
            prompt=self.check(prompt),
            max_tokens=params.max_tokens or self.engine.planner.capacity,
            temperature=params.temperature,
            top_p=params.top_p,
            seed=index if params.seed is None else params.seed,
            stop_ids=frozenset() if params.ignore_eos else self.eos_ids,
        )

    def _text_stream(self) -> TextStream:
        return self.tokenizer.stream() if self.tokenizer else TextStream(lambda ids: "")

    def _run(self, requests: list[Request]) -> Iterator[Chunk]:
        answers = {
            request.id: _Answer(index, len(request.prompt), self._text_stream())
            for index, request in enumerate(requests)
        }
        if self.engine.planner.busy:
            raise InputError("an earlier stream of this model is unfinished: end or close it first")
        for request in requests:
            self.engine.planner.add(request)
        try:
            for sampled in self.engine.run():
                yield from (answers[token.id].add(token) for token in sampled)
        finally:
            self.engine.planner.cancel(answers.keys())


@dataclasses.dataclass(eq=False)
class _Answer:
    index: int
    prompt_tokens: int
    stream: TextStream
    token_ids: list[int] = dataclasses.field(default_factory=list)
    pieces: list[str] = dataclasses.field(default_factory=list)

    def add(self, sampled: Sampled) -> Chunk:
        self.token_ids.append(sampled.token)
        text = self.stream.push(sampled.token)
        if sampled.finish_reason:
            text += self.stream.flush()
        self.pieces.append(text)
        completion = None
        if sampled.finish_reason:
            completion = Completion(
                text="".join(self.pieces), token_ids=tuple(self.token_ids),
                finish_reason=sampled.finish_reason, prompt_tokens=self.prompt_tokens,
            )  # fmt: skip
        return Chunk(index=self.index, text=text, completion=completion)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int | Mapping)):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportReturnType]


def _grid(length: int, max_rows: int, page_size: int, token_budget: int) -> Grid:
    budget = max(token_budget, max_rows)
    return Grid(
        page_size=page_size,
        max_rows=max_rows,
        pages_per_row=math.ceil(length / page_size),
        row_buckets=tuple(sorted({n for n in (1, 8) if n < max_rows} | {max_rows})),
        token_buckets=tuple(sorted({min(budget, max(64, max_rows)), budget})),
        split_pages=max(1, 256 // page_size),
    )


def _num_pages(cache: CacheConfig, kv_memory: int | None) -> int:
    """As many pages as fit in the memory, but no more than all rows can hold."""
    platform, most = jax.default_backend(), cache.max_rows * cache.pages_per_row
    page, fixed = cache.page_bytes(platform), cache.nbytes(platform) - cache.page_bytes(platform)
    if kv_memory is None:
        stats = jax.local_devices()[0].memory_stats()
        kv_memory = 2**30
        if stats and "bytes_limit" in stats:
            kv_memory = int(0.9 * (stats["bytes_limit"] - stats["bytes_in_use"]))
    if kv_memory < fixed + page:
        raise InputError(
            f"{kv_memory} bytes of KV memory hold no page: a page of this model needs {page} bytes "
            f"and the table {fixed}; raise the KV memory or lower the rows"
        )
    return min(most, (kv_memory - fixed) // page)
