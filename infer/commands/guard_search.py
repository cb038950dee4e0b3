"""`kvjax search --prompts`: answers prompts by a search whose every next token is rated."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from tqdm import tqdm

from kvjax.errors import InputError
from kvjax.infer.commands.shared import parse_arguments
from kvjax.infer.llm import find_model
from kvjax.infer.search.token_models import TokenOptions, load_guard
from kvjax.infer.search.token_search import Found, TokenSearch
from kvjax.models.tokenizer import Tokenizer

__all__ = ["GuardSearch", "main", "read_prompts"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardSearch(TokenOptions):
    """Answer prompts by a search that keeps to what a reward model finds safe.

    Attributes:
        prompts: a prompt a line: text, or JSON with "prompt" (text) or "tokens" (ids).
        policy: speaks: a folder or a built-in model.
        reward: rates every next token: a folder of `kvjax train mrm`, or a built-in model.
        judge: judges texts, for methods that ask a PRM: a folder with reward.json.
        out: a JSON object for each prompt: its answer, and by what it was chosen.
        at_a_time: prompts that are searched together.
        dtype: float32 or bfloat16, of policy and judge; by default on the CPU float32.
        json: end with one JSON object on stdout.
    """

    prompts: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    policy: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "guard-policy"
    reward: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    judge: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    at_a_time: int = 8
    dtype: str | None = None
    json: bool = False


def read_prompts(path: Path, tokenizer: Tokenizer | None) -> list[list[int]]:
    """The token ids of a file's prompts.

    Raises:
        InputError: it cannot be read, has none, or has text for a model without a tokenizer.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({e}): give a text file") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_ids(line.strip(), tokenizer, f"{path}: line {number}"))
    if not found:
        raise InputError(f"{path}: no prompts in it: write one a line")
    return found


def _ids(line: str, tokenizer: Tokenizer | None, where: str) -> list[int]:
    text: Any = line
    if line.startswith("{"):
        try:
            fields = json.loads(line)
            if "tokens" in fields:
                return [int(token) for token in fields["tokens"]]
            text = fields["prompt"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f'{where} is no JSON with "prompt" or "tokens"') from None
    if tokenizer is None:
        raise InputError(f'{where} is text, and the policy has no tokenizer.json: give "tokens"')
    return tokenizer.encode(str(text))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_arguments(GuardSearch, "kvjax search", argv)
    if args.at_a_time < 1:
        raise InputError(f"--at-a-time must be 1 or more, not {args.at_a_time}")
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else None)
    policy = find_model(args.policy)
    tokenizer = Tokenizer.load(policy) if (policy / "tokenizer.json").is_file() else None
    prompts = read_prompts(args.prompts, tokenizer)
    reward, judge = (None if m is None else find_model(m) for m in (args.reward, args.judge))
    ends = tokenizer.eos_ids if tokenizer is not None else ()
    models = load_guard(policy, reward, judge, ends=ends, dtype=dtype)
    search = TokenSearch(
        models, args, prompts_at_a_time=min(args.at_a_time, len(prompts)),
        prompt_tokens=max(map(len, prompts)),
    )  # fmt: skip
    start = time.perf_counter()
    with tqdm(total=len(prompts), unit="prompt", disable=None) as bar:
        found = search.search(prompts, progress=lambda done, of: bar.update(done - bar.n))
    seconds = time.perf_counter() - start
    texts = [tokenizer.decode(f.tokens) if tokenizer is not None else "" for f in found]
    _write(args.out, found, texts)
    if args.json:
        print(json.dumps({"prompts": len(prompts), "seconds": round(seconds, 3),
                          "method": args.method, "ledger": search.ledger.as_dict()}))  # fmt: skip
        return 0
    if args.out is None:
        for text, each in zip(texts, found, strict=True):
            print(text or list(each.tokens))
    print(
        f"{len(prompts)} prompts answered in {seconds:.1f} s; {search.ledger.flops / 1e9:.3g} "
        "GFLOP in all models"
    )
    return 0


def _write(out: Path | None, found: list[Found], texts: list[str]) -> None:
    if out is None:
        return
    records = [
        {"answer": text, "tokens": each.tokens, "score": round(each.score, 6),
         "ended": each.ended, "among": each.others}
        for text, each in zip(texts, found, strict=True)
    ]  # fmt: skip
    try:
        out.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    except OSError as e:
        raise InputError(f"{out}: cannot be written ({e.strerror})") from None
