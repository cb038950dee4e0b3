"""`kvjax generate`: continues a prompt and shows the answer as it is generated."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from kvjax.errors import InputError
from kvjax.infer.answers import Completion
from kvjax.infer.batch_records import TokenNames, chat_logprobs
from kvjax.infer.commands.shared import ModelOptions, parse_arguments, warm_up
from kvjax.infer.compilations import CompilationCount
from kvjax.infer.llm import LLM, Prompt
from kvjax.infer.sampling import SamplingParams

__all__ = ["Generate", "main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions):
    """Continue a prompt. With a chat model the prompt is the user's message, unless --raw."""

    prompt: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = None
    """The prompt; without it, --file or standard input is read."""
    file: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Read the prompt from this file; - is standard input."""
    system: Annotated[str | None, tyro.conf.arg(metavar="TEXT|@PATH")] = None
    """A system message to put before the prompt; @FILE reads it from a file."""
    raw: bool = False
    """Give the model the text as it is, without its chat template."""
    max_tokens: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """The most tokens to generate; by default until the model ends or its context is full."""
    min_tokens: int = 0
    """Do not let the model end before so many tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Draw from so many likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens whose probabilities reach this."""
    min_p: float = 0.0
    """Draw from tokens at least so likely as this times the likeliest one."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and the answer less likely; 1: no penalty."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that stand in the answer."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit as often as it stands in the answer."""
    seed: int = 0
    """Of the draws."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """End the answer before this text; may be given several times."""
    ignore_eos: bool = False
    """Go on after the model's end token."""
    logprobs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """With --json, each token's log-probability and those of so many likeliest ones."""
    json: bool = False
    """Print nothing but one JSON object with the answer and its figures."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_arguments(Generate, "kvjax generate", argv)
    params = _params(args)
    text = _text(args)
    llm = args.load(max_rows=1, decode_steps=1)  # every token is shown as it comes
    prompt = _prompt(args, llm, text)
    llm.check(prompt, params)
    warm_up(llm)
    start = time.perf_counter()
    with CompilationCount() as compiled:
        completion = _stream(llm, prompt, params, quiet=args.json)
    if args.json:
        _print_json(llm, completion, time.perf_counter() - start, compiled.count)
    return 0


def _params(args: Generate) -> SamplingParams:
    if args.logprobs is not None and not args.json:
        raise InputError("--logprobs is shown by --json: give both")
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    given = {name: value for name, value in vars(args).items() if name in names}
    try:
        return SamplingParams(**given)
    except ValueError as e:
        raise InputError(str(e)) from e


def _text(args: Generate) -> str:
    if args.prompt is not None and args.file is not None:
        raise InputError("a prompt and --file: give one of them")
    if args.prompt is not None:
        return args.prompt
    if args.file is None and sys.stdin.isatty():
        raise InputError("no prompt: give it as an argument, by --file, or on standard input")
    if args.file is None or str(args.file) == "-":
        return sys.stdin.read()
    return _read(args.file)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}: give a readable text file") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text at byte {e.start}") from e


def _prompt(args: Generate, llm: LLM, text: str) -> Prompt:
    if args.raw or llm.tokenizer is None or llm.tokenizer.chat_template is None:
        if args.system is not None:
            raise InputError("--system needs a model with a chat template, and no --raw")
        return text
    messages = [{"role": "user", "content": text}]
    if args.system is not None:
        system = args.system
        system = _read(Path(system[1:])) if system.startswith("@") else system
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _stream(llm: LLM, prompt: Prompt, params: SamplingParams, *, quiet: bool) -> Completion:
    completion = None
    for chunk in llm.stream(prompt, params):
        if not quiet:
            print(chunk.text, end="", flush=True)
        completion = chunk.completion
    if not quiet:
        print()
    assert completion is not None  # the last chunk has it
    return completion


def _print_json(llm: LLM, completion: Completion, seconds: float, compiled: int) -> None:
    planner, generated = llm.engine.planner, len(completion.token_ids)
    figures = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "prefill_tokens_computed": planner.prefill_tokens_computed,
        "output_tokens": generated,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(generated / seconds, 1),
        "peak_pages": planner.ledger.peak,
        "compilations_after_warmup": compiled,
    }
    if completion.logprobs is not None:
        figures["logprobs"] = chat_logprobs(completion.logprobs, TokenNames(llm.tokenizer))
    print(json.dumps(figures, ensure_ascii=False))
