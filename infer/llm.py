"""The public API: a language model that answers prompts."""

import dataclasses
import importlib.resources
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from kvjax.cache import OutOfPages
from kvjax.errors import InputError
from kvjax.infer.answers import Answer, Chunk, Completion
from kvjax.infer.chat import Chat
from kvjax.infer.compilations import keep_compilations
from kvjax.infer.engine import Engine
from kvjax.infer.planners import PLANNED, POLICIES
from kvjax.infer.prefix import Prefix, check_idle, load_prefix, save_prefix
from kvjax.infer.replicas import deal, params_of, replica_meshes, run_all
from kvjax.infer.sampling import MAX_STOP_IDS, SamplingParams
from kvjax.infer.scores import Score, join, score_of, scoring
from kvjax.infer.sizes import choose_grid, choose_num_pages
from kvjax.models import hf
from kvjax.models.tokenizer import TextStream, Tokenizer, named_ids
from kvjax.plan import Request

__all__ = ["BUILT_IN_MODELS", "LLM", "Prompt", "find_model"]

BUILT_IN_MODELS = ("tiny", "countdown")

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or the messages of a chat ({"role": ..., "content": ...})."""


def find_model(model: str | Path) -> Path:
    """The folder of a model: a path, a finished run of `kvjax train lm`, or a built-in name."""
    folder = Path(model)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    if str(model) in BUILT_IN_MODELS:
        return Path(str(importlib.resources.files("kvjax.models"))) / str(model).replace("-", "_")
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
        self, engine: Engine, tokenizer: Tokenizer | None, eos_ids: Iterable[int] = (),
        *more: Engine,
    ) -> None:  # fmt: skip
        self.engines: tuple[Engine, ...] = (engine, *more)
        self.tokenizer = tokenizer
        self.eos_ids: frozenset[int] = frozenset(eos_ids)
        self._next_id = 0

    @property
    def engine(self) -> Engine:
        """That of the first copy of the model, mostly the only one."""
        return self.engines[0]

    @staticmethod
    def load(
        model: str | Path,
        *,
        dtype: str | None = None,
        kv_memory: int | None = None,
        max_length: int | None = None,
        max_rows: int = 64,
        page_size: int = 16,
        token_budget: int | None = None,
        decode_steps: int = 8,
        plan: str = "fcfs-lru",
        grouped: bool | None = None,
        optimistic: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "LLM":
        """Loads a model.

        Compiled programs are kept in the user's cache folder, see
        `kvjax.infer.compilations.keep_compilations`.

        Args:
            model: a Hugging Face folder (config.json, tokenizer.json, *.safetensors), a finished
                run of `kvjax train lm`, or the name of a built-in model. Without a tokenizer.json
                prompts are token ids, and the texts of answers are empty.
            dtype: "float32" or "bfloat16"; None: as stored.
            kv_memory: bytes for the KV cache, in device layout; None: most of what the device has
                left, on the CPU what `max_rows` rows of `max_length` need but at most 1 GiB. On a
                mesh each copy of the model has as much.
            max_length: the longest sequence, prompt and answer together, in tokens; None: what the
                model was made for, but at most 8192.
            max_rows: requests that are answered at the same time.
            page_size: tokens of a page.
            token_budget: the most tokens that a step computes, prompts' chunks included; None: 512
                on the CPU, 4096 on accelerators.
            decode_steps: the most tokens of a request that one call of the device draws; answers
                are streamed in pieces of so many.
            plan: how requests are planned: "fcfs-lru" answers them in their order; "multi" plans
                each call's prompts as one batch, whatever order that needs. See
                `kvjax.infer.planners.make_planner` for others.
            grouped: whether pages that requests share are read once for all of them. That is
                faster where much is shared; the last bits of a result then depend on the company
                it is computed in. None: only if `plan` plans batches.
            optimistic: begin requests before it is sure that memory lasts for all of them. More
                run at a time; where memory ends, the youngest wait and compute their tokens again.
            mesh: splits weights and heads over its devices, see `kvjax.sharding`; each index of its
                axis `data` is a copy of the model with its own cache, and requests are dealt to
                them, those that share a beginning together. Chats and loaded prefixes live in the
                first. None: the default device.

        Raises:
            InputError: something in the folder cannot be used, or the memory is too little.
        """
        if plan not in POLICIES:
            raise InputError(f"no plan {plan!r}: use one of {', '.join(POLICIES)}")
        keep_compilations()
        folder = find_model(model)
        hf.read_config(folder)  # first of all: the plainest thing that may be wrong
        tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
        eos_ids = tokenizer.eos_ids if tokenizer else named_ids(folder, "eos")
        parts = [None] if mesh is None else replica_meshes(mesh)
        graph, loaded, config = hf.load(folder, dtype=dtype, mesh=mesh)
        copies = [loaded if part is None else params_of(loaded, part) for part in parts]
        length = min(max_length or 8192, config.max_positions)
        grid = choose_grid(
            length, max_rows, page_size, token_budget, decode_steps,
            shared=plan in PLANNED if grouped is None else grouped,
        )  # fmt: skip
        num_pages = choose_num_pages(config, grid, kv_memory)
        engines = [
            Engine(
                graph, params, config, grid, num_pages, mesh=part, plan=plan,
                optimistic=optimistic, consume=True,
            )
            for params, part in zip(copies, parts, strict=True)
        ]  # fmt: skip
        return LLM(engines[0], tokenizer, eos_ids, *engines[1:])

    def generate(
        self, prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """Answers prompts, many at a time; equal beginnings are computed once.

        Args:
            prompts: one prompt or several: text, token ids or chat messages.
            params: for all, or one for each.

        Returns:
            The completions, in the order of the prompts; `n` of each, after each other.

        Raises:
            InputError: a prompt cannot be answered; none was begun.
        """
        chunks = self.stream(prompts, params)
        done = {(c.index, c.choice): c.completion for c in chunks if c.completion}
        return [done[key] for key in sorted(done)]

    def warm_up(self, progress: Callable[[int, int], object] = lambda done, total: None) -> None:
        """Compiles all programs; otherwise the first request does.

        Args:
            progress: called with how many of how many are done.
        """
        count = len(self.engines)
        for i, engine in enumerate(self.engines):
            engine.warm_up(lambda done, of, i=i: progress(i * of + done, count * of))

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
            self._request(index, choice, ids, p)
            for index, (prompt, p) in enumerate(zip(many, each, strict=True))
            for ids in [self.check(prompt, p)]
            for choice in range(p.n)
        ]
        return self._run(requests)

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str | Sequence[int]]
    ) -> list[Score]:
        """How likely given continuations are; of equal prompts all but one find the pages.

        Args:
            prompts: text, token ids or chat messages, one for each continuation.
            continuations: text or token ids; after a chat, the answer.

        Raises:
            InputError: something has no tokens or too many; nothing was computed.
        """
        if len(prompts) != len(continuations):
            raise InputError(f"{len(prompts)} prompts for {len(continuations)} continuations")
        pairs = zip(prompts, continuations, strict=True)
        joined = [join(self.tokenizer, prompt, continuation) for prompt, continuation in pairs]
        params = [scoring(start) for _, start in joined]
        return [score_of(done) for done in self.generate([ids for ids, _ in joined], params)]

    def chat(self, system: str | None = None, messages: Sequence[Message] = ()) -> Chat:
        """Begins a conversation whose turns go on from the pages of those before.

        Args:
            system: what the model is told first; None: nothing.
            messages: what was said before.

        >>> with LLM.load("tiny").chat("The code of the loud bear is 2350.") as chat:
        ...     chat.send("What is the code of the loud bear?").text
        '2350'
        """
        told = [] if system is None else [{"role": "system", "content": system}]
        return Chat(self, [*told, *messages])

    def load_chat(self, path: str | Path) -> Chat:
        """Goes on with a conversation that `Chat.save` wrote.

        Raises:
            InputError: the file is damaged, of another model or page size, or no chat, or there
                is no room for its pages.
        """
        return Chat.load(self, path)

    def save_prefix(self, prompt: Prompt, path: str | Path) -> int:
        """Writes the keys and values of a prompt to a file, for `load_prefix`.

        Only whole pages are written; computed is what is not in the cache already.

        Args:
            prompt: what later prompts will begin with: text, token ids or the messages of a chat.
            path: replaced if it exists; it appears whole or not at all.

        Returns:
            How many tokens were written.

        Raises:
            InputError: the prompt fills no page, or the file cannot be written.
        """
        if self.tokenizer and _is_chat(prompt):  # the model's answer is not begun
            prompt = self.tokenizer.encode_chat(prompt, add_generation_prompt=False)  # pyright: ignore[reportArgumentType]
        ids = self.check(prompt)
        with Prefix(self.engine) as prefix:
            self._compute(prefix, ids)
            save_prefix(prefix, path, {"kind": "prefix"})
            return len(prefix.tokens)

    def _compute(self, prefix: Prefix, ids: tuple[int, ...]) -> None:
        """Makes a prefix hold the whole pages of a prompt."""
        size = self.engine.grid.page_size
        whole = len(ids) // size * size
        if not whole:
            raise InputError(
                f"the prompt has {len(ids)} tokens, fewer than a page of {size}: nothing to save"
            )
        check_idle(self.engine)
        prefix.follow(ids[:whole])
        if len(prefix.tokens) < whole:
            request, answer = self._request(0, 0, ids, SamplingParams())
            for _ in self._run([(dataclasses.replace(request, max_tokens=0), answer)]):
                pass
            prefix.follow(ids[:whole])

    def load_prefix(self, path: str | Path) -> Prefix:
        """Reads what `save_prefix` wrote: prompts that begin with it are not computed again.

        Its pages are held until `close`, or the end of a `with`.

        Raises:
            InputError: the file is damaged, of another model or page size, or no prefix, or there
                is no room for its pages.
        """
        return load_prefix(self.engine, path, "prefix")[0]

    def check(self, prompt: Prompt, params: SamplingParams | None = None) -> tuple[int, ...]:
        """The tokens of a prompt.

        Raises:
            InputError: it can never be answered, or not in this way.
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
        for what, tokens in (("the prompt", ids), *_named_tokens(params or SamplingParams())):
            if tokens and (min(tokens) < 0 or max(tokens) > last):
                raise InputError(f"{what} has token ids outside of 0..{last}")
        if params and params.stop and self.tokenizer is None:
            raise InputError("the model's folder has no tokenizer.json: give stop_ids, not stop")
        if params and len(self._stop_ids(params)) > MAX_STOP_IDS:
            raise InputError(f"more than {MAX_STOP_IDS} tokens may end an answer: name fewer")
        return ids

    def _tokens(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str) and not _is_chat(prompt):
            return prompt  # pyright: ignore[reportReturnType]
        if self.tokenizer is None:
            raise InputError("the model's folder has no tokenizer.json: give token ids, or add it")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat(prompt)  # pyright: ignore[reportArgumentType]

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        own = frozenset() if params.ignore_eos else self.eos_ids
        return own | frozenset(params.stop_ids)

    def _request(
        self, index: int, choice: int, prompt: tuple[int, ...], params: SamplingParams
    ) -> tuple[Request, Answer]:
        self._next_id += 1
        seed = index * params.n if params.seed is None else params.seed
        params = dataclasses.replace(params, seed=(seed + choice) % 2**32)
        capacity = self.engine.planner.capacity
        # The prompt's scores are its first answer's: the others would only compute them again.
        scored = params.prompt_logprobs is not None and choice == 0
        score_from = min(params.prompt_logprobs_from, len(prompt)) if scored else None
        request = Request(
            id=self._next_id,
            prompt=prompt,
            max_tokens=capacity if params.max_tokens is None else params.max_tokens,
            expected_tokens=params.expected_tokens,
            stop_ids=self._stop_ids(params),
            score_from=score_from,
            logprobs=params.logprobs is not None,
            greedy=params.is_greedy,
            sampling=params,
        )
        stream = self.tokenizer.stream() if self.tokenizer else TextStream(lambda ids: "")
        return request, Answer(index, choice, prompt, params, stream, score_from)

    def _run(self, requests: list[tuple[Request, Answer]]) -> Iterator[Chunk]:
        if any(engine.planner.busy for engine in self.engines):
            raise InputError("an earlier stream of this model is unfinished: end or close it first")
        answers = {request.id: answer for request, answer in requests}
        home = self._deal([request for request, _ in requests])
        try:
            for outputs in run_all(self.engines):
                for output in outputs:
                    chunk = answers[output.id].add(output)
                    if chunk.completion and not output.finish_reason:
                        # A text ended it, which only we can see.
                        home[output.id].planner.cancel([output.id])
                    yield chunk
        except OutOfPages as e:
            raise InputError(str(e)) from e
        finally:
            for engine in self.engines:
                engine.planner.cancel(answers.keys())

    def _deal(self, requests: list[Request]) -> dict[int, Engine]:
        """Gives every request to one of the engines: its id's."""
        hands = deal(requests, self.engine.grid.page_size, len(self.engines))
        home: dict[int, Engine] = {}
        for engine, hand in zip(self.engines, hands, strict=True):
            for i in hand:
                engine.planner.add(requests[i])
                home[requests[i].id] = engine
        return home


def _named_tokens(params: SamplingParams) -> Iterator[tuple[str, Sequence[int]]]:
    yield "stop_ids", params.stop_ids
    yield "logit_bias", tuple(params.logit_bias)


def _is_chat(prompt: Prompt) -> bool:
    return bool(prompt) and isinstance(prompt[0], Mapping)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int | Mapping)):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportReturnType]
