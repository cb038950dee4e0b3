"""`kvjax private`: a decoder between parties none of whom sees both weights and prompt."""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from flax import nnx
from tqdm import tqdm

from kvjax.errors import InputError
from kvjax.infer.commands.shared import parse_arguments
from kvjax.infer.llm import find_model
from kvjax.infer.private.model import POLICIES, prepare
from kvjax.infer.private.run import OWNER, add_generation, in_the_clear
from kvjax.infer.private.session import PARTIES, Job, Outcome, run_job
from kvjax.models import hf
from kvjax.models.tokenizer import Tokenizer

__all__ = ["PrivateRun", "costs", "main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivateRun:
    """Continue a prompt under secret sharing. Without --rank all parties run on this machine, each
    a process of its own; with it only that one, and every other is started with the same public
    options where it belongs. Party 0 owns the weights, party 1 the prompt.
    """

    prompt: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = None
    """The prompt, for the party that asks. Token ids in brackets are taken as they are."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "tiny"
    """A Hugging Face folder or a built-in model; config.json (public) is read by every party, the
    weights by party 0 alone."""
    max_tokens: int = 8
    """How many tokens to generate; public."""
    protocol: Annotated[str, tyro.conf.arg(metavar="NAME")] = "ABY3"
    """ABY3: three parties, of whom no two collude. SEMI2K (for tests: the first party makes the
    random triples) and CHEETAH: two parties."""
    policy: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """full, static, published or ours: what of the cache is kept and read. By default ours under
    ABY3 and static elsewhere, where fetching costs as much as reading."""
    exp: Annotated[str, tyro.conf.arg(metavar="NAME")] = "pade"
    """pade (1e-4 exact) or default (1e-3, with fewer bytes)."""
    rank: int | None = None
    """Run only this party."""
    hosts: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A file with one host:port a line, the parties in order; by default loopback."""
    prompt_tokens: int | None = None
    """With --rank: the length of the prompt in tokens, which is public."""
    timeout: float = 20.0
    """Seconds in which every party must be reached; one may be silent six times as long."""
    tls: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A folder with cert.pem, key.pem and ca.pem: links are encrypted, and peers must have a
    certificate of that authority."""
    simulate: bool = False
    """All parties as threads of one process."""
    check: bool = False
    """Also compute in the clear, and say whether the tokens agree (all parties on this machine)."""
    json: bool = False
    """End with one JSON object on stdout."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_arguments(PrivateRun, "kvjax private run", argv)
    _check(args)
    folder = find_model(args.model)
    config = hf.read_config(folder)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    addresses = _addresses(args)
    job = Job(
        protocol=args.protocol, exp=args.exp, addresses=addresses, simulate=args.simulate,
        timeout=args.timeout,
    )  # fmt: skip
    prompt = _prompt(args, tokenizer) if args.rank in (None, job.client) else None
    tokens = len(prompt) if prompt is not None else args.prompt_tokens or 0
    if args.prompt_tokens not in (None, tokens):
        raise InputError(f"--prompt-tokens {args.prompt_tokens}: the prompt has {tokens}")
    if prompt and (wrong := [i for i in prompt if not 0 <= i < config.vocab_size]):
        raise InputError(f"token {wrong[0]}: the model has {config.vocab_size}")
    weights = None
    if args.rank in (None, OWNER):
        _, params, _ = hf.load(folder, dtype="float32")
        weights = prepare(nnx.to_pure_dict(params), config)
    policy = args.policy or ("ours" if args.protocol == "ABY3" else "static")
    add_generation(
        job, config, POLICIES[policy], tokens=tokens, new_tokens=args.max_tokens, weights=weights,
        prompt=prompt,
    )  # fmt: skip
    outcome, seconds = _run(args, job, len(job.steps), config.num_layers)
    text = "" if tokenizer is None else tokenizer.decode(outcome.tokens)
    figures: dict[str, Any] = {
        "protocol": args.protocol, "policy": policy, "exp": args.exp, "text": text,
        "token_ids": outcome.tokens, "prompt_tokens": tokens, "seconds": round(seconds, 3),
        "costs": costs(outcome),
    }  # fmt: skip
    if args.check:
        clear, _ = in_the_clear(job)
        figures["clear_token_ids"] = clear
        figures["agree"] = clear == outcome.tokens
    _print(args, figures)
    return 0


def _check(args: PrivateRun) -> None:
    if args.protocol not in PARTIES:
        raise InputError(f"no protocol {args.protocol!r}: use one of {', '.join(PARTIES)}")
    if args.policy is not None and args.policy not in POLICIES:
        raise InputError(f"no policy {args.policy!r}: use one of {', '.join(POLICIES)}")
    if args.exp not in ("pade", "default"):
        raise InputError(f"no exp {args.exp!r}: use pade or default")
    if args.max_tokens < 1 or args.timeout <= 0:
        raise InputError("--max-tokens and --timeout must be above 0")
    if args.rank is None:
        return
    if not 0 <= args.rank < PARTIES[args.protocol]:
        raise InputError(
            f"--rank {args.rank}: {args.protocol} has {PARTIES[args.protocol]} parties"
        )
    if args.hosts is None or args.simulate or args.check:
        raise InputError("--rank needs --hosts, and goes without --simulate and --check")
    if args.rank != 1 and args.prompt_tokens is None:
        raise InputError("--rank: give the length of the prompt by --prompt-tokens")


def _addresses(args: PrivateRun) -> list[str]:
    """The parties' addresses from the file, none for loopback."""
    if args.hosts is None:
        return []
    try:
        lines = [line.strip() for line in args.hosts.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{args.hosts}: {e}: write one host:port a line") from e
    addresses = [line for line in lines if line and not line.startswith("#")]
    wrong = [line for line in addresses if not re.fullmatch(r"[^\s:]+:\d{1,5}", line)]
    if wrong:
        raise InputError(f"{args.hosts}: {wrong[0]!r} is no host:port")
    if len(addresses) != PARTIES[args.protocol]:
        raise InputError(
            f"{args.hosts}: {len(addresses)} addresses; {args.protocol} has "
            f"{PARTIES[args.protocol]} parties"
        )
    return addresses


def _prompt(args: PrivateRun, tokenizer: Tokenizer | None) -> list[int]:
    if args.prompt is None:
        raise InputError("no prompt: give it as an argument, to the party that asks (rank 1)")
    if re.fullmatch(r"\[\s*\d+(\s*,\s*\d+)*\s*\]", args.prompt):
        return json.loads(args.prompt)
    if tokenizer is None:
        raise InputError("the model has no tokenizer.json: give token ids, such as [1, 5, 2]")
    ids = tokenizer.encode(args.prompt)
    if not ids:
        raise InputError("the prompt is empty")
    return ids


def _tls(args: PrivateRun) -> dict[str, str] | None:
    if args.tls is None:
        return None
    names = {"certificate": "cert.pem", "key": "key.pem", "ca": "ca.pem"}
    paths = {use: args.tls / name for use, name in names.items()}
    if missing := [path for path in paths.values() if not path.is_file()]:
        raise InputError(f"{missing[0]}: no such file: --tls wants {', '.join(names.values())}")
    return {use: str(path) for use, path in paths.items()}


def _run(args: PrivateRun, job: Job, steps: int, layers: int) -> tuple[Outcome, float]:
    """Runs the job behind a progress bar, a token a tick."""
    begin = time.perf_counter()
    with tqdm(total=args.max_tokens, unit="token", desc="linking", disable=None) as bar:

        def follow(event: dict[str, Any]) -> None:
            if event["event"] == "linked":
                bar.set_description("sharing weights")
            elif event["event"] == "mark" and event["rank"] == (args.rank or 0):
                name = event["label"]
                bar.set_description("reading the prompt" if name == "weights" else "generating")
                bar.update(name != "weights")

        ranks = None if args.rank is None else [args.rank]
        outcome = run_job(job, ranks, follow=follow, tls=_tls(args))
    return outcome, time.perf_counter() - begin


def costs(outcome: Outcome) -> list[dict[str, Any]]:
    """What each part cost each party: bytes sent, messages one after the other, seconds."""
    found = []
    for mark in outcome.marks:
        operators: dict[str, list[int]] = {}
        for run in mark["runs"]:
            for name, (times, sent, actions) in run["operators"].items():
                if name.startswith("pphlo."):
                    total = operators.setdefault(name.removeprefix("pphlo."), [0, 0, 0])
                    operators[name.removeprefix("pphlo.")] = [
                        a + b for a, b in zip(total, (times, sent, actions), strict=True)
                    ]
        found.append({
            "part": mark["label"], "party": mark["rank"], "seconds": round(mark["seconds"], 4),
            "shared_bytes": mark["shared_bytes"], "bytes": sum(r["bytes"] for r in mark["runs"]),
            "actions": sum(r["actions"] for r in mark["runs"]), "operators": operators,
        })  # fmt: skip
    return found


def _print(args: PrivateRun, figures: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps(figures, ensure_ascii=False))
        return
    if args.rank in (None, 1):
        print(figures["text"] or figures["token_ids"])
    for cost in figures["costs"]:
        print(
            f"party {cost['party']}, {cost['part']}: {cost['bytes'] + cost['shared_bytes']:,} "
            f"bytes sent, {cost['actions']} messages in a row, {cost['seconds']:.2f} s",
            file=sys.stderr,
        )
    if "agree" in figures:
        print("the same tokens in the clear" if figures["agree"] else "other tokens in the clear")
