"""`kvjax bench private`: bytes, messages and seconds of one private attention step.

Keys and values are random: bytes and messages depend on shapes alone. Three caches: the whole one,
MPCache as published, and ours, the last two over what static eviction kept. Under "mean" stands
the mean of a layer that chooses and one that shares the choice.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from kvjax.errors import InputError
from kvjax.infer.commands.shared import parse_arguments
from kvjax.infer.private.arithmetic import integer_product, keep_top
from kvjax.infer.private.attention import attend, attend_chosen, choose, representatives
from kvjax.infer.private.lowering import lower
from kvjax.infer.private.model import POLICIES, Policy
from kvjax.infer.private.session import PARTIES, Job, Network, Outcome, run_job

__all__ = ["NETWORKS", "BenchPrivate", "emulated_seconds", "main", "measure"]

NETWORKS = {
    "lan": Network(0.25e-3, 1e9), "wan1": Network(2e-3, 400e6), "wan2": Network(2e-3, 100e6),
    "wan3": Network(40e-3, 100e6),
}  # fmt: skip
"""One-way delay in seconds and bits a second: the settings of the protocols' own papers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchPrivate:
    """Measure an attention step under secret sharing: whole cache, published, ours."""

    protocol: Annotated[str, tyro.conf.arg(metavar="NAME")] = "ABY3"
    """ABY3, SEMI2K or CHEETAH."""
    exp: Annotated[str, tyro.conf.arg(metavar="NAME")] = "pade"
    """pade or default."""
    heads: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HxD ...")] = ("8x64", "32x128")
    """Heads and head sizes."""
    tokens: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (256, 512, 1024, 2048)
    """Cached tokens."""
    static: float = 0.4
    """The part that static eviction kept, for published and ours."""
    dynamic: float = 0.05
    """The part of all tokens that a step reads."""
    eviction: bool = False
    """Also measure static eviction itself: rank, and compaction of one layer's keys and values."""
    shaped: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Also run over an imitated network (lan, wan1, wan2, wan3), all parties in one process."""
    processes: bool = True
    """Each party a process of its own; otherwise threads of one, and party 0's counts alone."""
    json: bool = False
    """End with one JSON object on stdout."""


def emulated_seconds(cost: dict[str, float], network: Network) -> float:
    """What a step would take on a network: its messages wait one after the other."""
    rate = 8 * cost["bytes"] / network.rate
    return cost["seconds"] + cost["actions"] * network.delay + rate


def measure(
    args: BenchPrivate, heads: int, dim: int, tokens: int, network: Network | None = None
) -> dict[str, Any]:
    """One case: costs of each variant, and how far its outputs are from the clear ones."""
    policy = dataclasses.replace(POLICIES["ours"], static=args.static, dynamic=args.dynamic)
    job = Job(
        protocol=args.protocol, exp=args.exp, network=network,
        simulate=network is not None or not args.processes, timeout=60.0,
    )  # fmt: skip
    clear = _steps(job, heads, dim, tokens, policy, args.eviction)
    outcome = run_job(job)
    errors = {
        name: float(np.abs(outcome.opened[name] - value).max()) for name, value in clear.items()
    }
    costs = {name: _cost(outcome, name) for name in {m["label"] for m in outcome.marks} - {"in"}}
    for name in ("published", "ours"):
        costs[f"{name} mean"] = {
            key: costs[f"{name} read"][key] + 0.5 * costs[f"{name} choose"][key]
            for key in costs["full"]
        }
    return {
        "heads": heads, "dim": dim, "tokens": tokens, "kept": policy.kept(tokens),
        "costs": costs, "errors": errors,
        "fewer_bytes": {
            name: costs["full"]["bytes"] / costs[f"{name} mean"]["bytes"]
            for name in ("published", "ours")
        },
        "emulated": {
            name: {
                v: emulated_seconds(costs[v], net) for v in ("full", "published mean", "ours mean")
            }
            for name, net in NETWORKS.items()
        },
    }  # fmt: skip


def _steps(
    job: Job, heads: int, dim: int, tokens: int, policy: Policy, eviction: bool
) -> dict[str, np.ndarray]:
    """Fills a job; returns the outputs in the clear."""
    random, kept = np.random.default_rng(0), policy.kept(tokens)
    q = random.normal(size=(heads, dim)).astype(np.float32) * np.float32(dim**-0.5)
    k, v = random.normal(size=(2, heads, tokens, dim)).astype(np.float32)
    assert policy.choice is not None
    vectors = representatives(jnp.asarray(k[:, :kept]), policy.choice.size, policy.choice.alpha)
    values: dict[str, Any] = {
        "q": q, "k": k, "v": v, "kept_k": k[:, :kept], "kept_v": v[:, :kept], "r": vectors,
    }  # fmt: skip
    job.share(0, **{name: np.asarray(x) for name, x in values.items() if name != "q"})
    job.share(1, q=q)
    clear: dict[str, np.ndarray] = {}

    def case(name: str, function: Any, inputs: Sequence[str], out: str) -> None:
        arrays = [jnp.asarray(values[i]) for i in inputs]
        job.mark("in")
        job.run(lower(name.replace(" ", "_"), function, arrays), inputs, [out])
        job.mark(name)
        values[out] = jax.jit(function)(*arrays)
        # The engine's top-k gives the same set in any order: compared as a set.
        if not name.endswith("choose"):
            job.open(out, 1, name)
            clear[name] = np.asarray(values[out])

    case("full", attend, ["q", "k", "v"], "o")
    for name in ("published", "ours"):
        chosen = dataclasses.replace(
            POLICIES[name], static=policy.static, dynamic=policy.dynamic
        ).chosen(tokens)
        assert chosen is not None
        case(f"{name} choose", lambda q, r, c=chosen: choose(q, r, c), ["q", "r"], "c")
        read = ["q", "kept_k", "kept_v", "c"]
        case(f"{name} read", lambda q, k, v, c, h=chosen: attend_chosen(q, k, v, c, h), read, "o")
    if eviction:
        values["importance"] = random.random(tokens).astype(np.float32)
        values["rows"] = np.concatenate([k, v]).transpose(1, 0, 2).reshape(tokens, -1)
        job.share(0, importance=values["importance"], rows=values["rows"])
        case(
            "static eviction", lambda s, kv: integer_product(keep_top(s, kept), kv),
            ["importance", "rows"], "o",
        )  # fmt: skip
    return clear


def _cost(outcome: Outcome, label: str) -> dict[str, float]:
    """Mean over the parties: under ABY3 their parts differ, and change from run to run."""
    marks = [m for m in outcome.marks if m["label"] == label]
    runs = [m["runs"][-1] for m in marks if m["runs"]]
    cost = {
        "bytes": float(np.mean([run["bytes"] for run in runs])),
        "most_bytes": float(max(run["bytes"] for run in runs)),
        "actions": float(np.mean([run["actions"] for run in runs])),
        "seconds": float(max(run["seconds"] for run in runs)),
    }
    return cost


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0."""
    args = parse_arguments(BenchPrivate, "kvjax bench private", argv)
    cases = [_size(text) for text in args.heads]
    if args.protocol not in PARTIES:
        raise InputError(f"no protocol {args.protocol!r}: use one of {', '.join(PARTIES)}")
    if args.shaped is not None and args.shaped not in NETWORKS:
        raise InputError(f"no network {args.shaped!r}: use one of {', '.join(NETWORKS)}")
    if not 0 < args.dynamic <= args.static <= 1 or min(args.tokens) < 16:
        raise InputError("--dynamic and --static lie in (0, 1], --tokens from 16 on")
    found = []
    for heads, dim in cases:
        for tokens in args.tokens:
            found.append(measure(args, heads, dim, tokens))
            if args.shaped is not None:
                shaped = measure(args, heads, dim, tokens, NETWORKS[args.shaped])
                found[-1]["shaped"] = {args.shaped: shaped["costs"]}
            print(_lines(found[-1]), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps({"options": dataclasses.asdict(args), "cases": found}))
    return 0


def _size(text: str) -> tuple[int, int]:
    heads, _, dim = text.partition("x")
    if not heads.isdecimal() or not dim.isdecimal() or not int(heads) or not int(dim):
        raise InputError(f"--heads {text!r}: write heads x head size, such as 32x128")
    return int(heads), int(dim)


def _lines(case: dict[str, Any]) -> str:
    lines = [f"{case['heads']}x{case['dim']}, {case['tokens']} tokens, {case['kept']} kept"]
    for name, cost in case["costs"].items():
        wan = emulated_seconds(cost, NETWORKS["wan3"])
        lines.append(
            f"  {name:<16} {cost['bytes'] / 1e6:8.3f} MB {cost['actions']:7.0f} messages "
            f"{cost['seconds']:6.2f} s, {wan:6.1f} s at 40 ms and 100 Mbit/s"
        )
    fewer = case["fewer_bytes"]
    lines.append(f"  fewer bytes: published {fewer['published']:.1f}, ours {fewer['ours']:.1f}")
    return "\n".join(lines)
