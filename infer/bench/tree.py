"""`kvjax bench tree`: decoding the leaves of a search tree, with and without reading it as a tree.

A recorded search is played again, step by step, by a random model of a given shape: as many steps
from the same nodes, each of so many tokens. Both ways run through the same compiled programs, hold
the same pages and draw from the same seeds. In one, pages that leaves share are read once for all
of them; in the other each leaf reads its own row. What the selection of each level takes, on the
recorded scores, is measured beside it.
"""

import dataclasses
import importlib.resources
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from kvjax.cache import PageLedger
from kvjax.errors import InputError
from kvjax.infer.bench.batch import MODELS, random_engine
from kvjax.infer.commands.shared import parse_arguments
from kvjax.infer.compilations import CompilationCount
from kvjax.infer.llm import LLM
from kvjax.infer.planners import make_planner
from kvjax.infer.sampling import SamplingParams
from kvjax.infer.search import ETS, Frontier, Node
from kvjax.infer.search.rows import Draw, Held, StepEnds, draw_steps
from kvjax.infer.search.tasks import TASKS
from kvjax.plan import Grid

__all__ = ["BenchTree", "main", "read_tree"]

_NO_ENDS = StepEnds(frozenset(), frozenset())  # every step has all its tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchTree:
    """Measure the decoding of a search tree, read as a tree and leaf by leaf."""

    model: str = "tiny"
    """tiny: 2 layers of width 64. 8b: the shape of Llama-3.1-8B in bfloat16."""
    tree: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A tree of `kvjax search --trees`; by default one of ETS at width 64 on countdown-deep."""
    prompt: int = 2000
    """Tokens of the question."""
    step: int = 64
    """Tokens of each step."""
    levels: int = 12
    """The most levels of the tree to play."""
    repetitions: int = 2
    """Of each way, after a level or two that warm up."""
    page_size: int = 16
    """Tokens a page."""
    split_tokens: int = 1024
    """Tokens of a work item of the attention kernel."""
    lambda_b: float = 1.5
    """Of the selection that is measured: ETS with true-state clusters."""
    json: bool = False
    """End with one JSON object on stdout."""


def read_tree(path: Path | None) -> Node:
    """A recorded tree; None: the one that comes with the package.

    Raises:
        InputError: the file cannot be read.
    """
    own = importlib.resources.files("kvjax.infer.bench") / "tree.json"
    try:
        text = own.read_text() if path is None else path.read_text(encoding="utf-8")
        return _node(json.loads(text), None, ())
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: no tree of kvjax search --trees: give another --tree") from None


def _node(told: dict[str, Any], parent: Node | None, path: tuple[int, ...]) -> Node:
    node = Node(
        parent, (), told["text"], path, score=told["score"], count=told["count"],
        width=told["width"], finished=told["fate"] == "finished",
    )  # fmt: skip
    node.children = [_node(c, node, (*path, i)) for i, c in enumerate(told["children"])]
    return node


def _levels(root: Node, most: int) -> list[list[Node]]:
    """The nodes of each level, from the first steps on."""
    levels, level = [], root.children
    while level and len(levels) < most:
        levels.append(level)
        level = [child for node in level for child in node.children]
    return levels


def _llm(args: BenchTree, leaves: int) -> LLM:
    if args.model not in MODELS:
        raise InputError(f"no model {args.model!r}: use one of {', '.join(MODELS)}")
    config, size = MODELS[args.model], args.page_size
    length = args.prompt + args.levels * args.step
    if length > config.max_positions:
        raise InputError(f"{length} tokens a row, the model takes {config.max_positions}: ask less")
    cpu = jax.default_backend() == "cpu"
    grid = Grid(
        page_size=size, max_rows=leaves, pages_per_row=-(-length // size), row_buckets=(leaves,),
        # The last page of a step is not full before its last token's keys are there.
        token_buckets=(max(leaves, min(1024, leaves * size)),),
        split_pages=max(1, (128 if cpu else args.split_tokens) // size),
        shared_pages=max(1, 64 // size), fixed=not cpu, plain=False,
    )  # fmt: skip
    rows = leaves * (args.levels * args.step // size + 2)
    return LLM(random_engine(config, grid, args.prompt // size + 1 + rows), None)


def _play(
    args: BenchTree, llm: LLM, levels: list[list[Node]], prompt: tuple[int, ...], shared: bool,
    seed: int,
) -> dict[str, list[float]]:  # fmt: skip
    """Plays a tree; seconds of each level's drawing and selection, tokens drawn, pages held."""
    engine = llm.engine
    ledger = PageLedger(engine.cache.num_pages)
    engine.planner = make_planner("fcfs-lru", engine.grid, ledger, grouped=shared)
    held = Held(engine)
    made: dict[tuple[int, ...], tuple[int, ...]] = {(): prompt}
    sampling = SamplingParams(temperature=1.0)
    draw_steps(llm, held, [Draw((0, ()), prompt, 0, 0)], _NO_ENDS, sampling)
    spent: dict[str, list[float]] = {"seconds": [], "select": [], "tokens": [], "pages": []}
    for depth, level in enumerate(levels):
        draws = [
            Draw((0, node.path), made[node.path[:-1]], seed * 2**16 + depth * 256 + i, args.step)
            for i, node in enumerate(level)
        ]
        start = time.perf_counter()
        drawn = draw_steps(llm, held, draws, _NO_ENDS, sampling)
        spent["seconds"].append(time.perf_counter() - start)
        spent["tokens"].append(sum(len(step.tokens) for step in drawn))
        spent["pages"].append(ledger.held)
        held.release([(0, path) for path in made])
        going = [i for i, node in enumerate(level) if node.children]
        made = {level[i].path: (*draws[i].prompt, *drawn[i].tokens) for i in going}
        held.release([(0, node.path) for node in level if not node.children])
        start = time.perf_counter()
        _select(args, [node for node in level if not node.finished], len(level))
        spent["select"].append(time.perf_counter() - start)
    held.close()
    return spent


def _select(args: BenchTree, leaves: list[Node], width: int) -> None:
    """What a search decides at a level; the recorded tree has its own outcome."""
    if leaves:
        task = TASKS["countdown-deep"]
        policy = ETS(lambda_b=args.lambda_b, clusters=task.states)
        policy.allocate(Frontier(leaves=leaves, width=width, full_width=width))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_arguments(BenchTree, "kvjax bench tree", argv)
    levels = _levels(read_tree(args.tree), args.levels)
    leaves = max(map(len, levels))
    start = time.perf_counter()
    llm = _llm(args, leaves)
    llm.warm_up(lambda done, of: _say(f"compiled {done} of {of}"))
    built = time.perf_counter() - start
    words = np.random.default_rng(0)
    ways: dict[str, list[dict[str, list[float]]]] = {"tree": [], "rows": []}
    with CompilationCount() as compiled:
        for repetition in range(args.repetitions + 1):
            prompt = tuple(words.integers(0, llm.engine.model.vocab_size, args.prompt).tolist())
            for way, played in ways.items():
                # The first time warms up: two levels are enough for that.
                some = levels if repetition else levels[:2]
                spent = _play(args, llm, some, prompt, way == "tree", repetition)
                _say(f"{way}: {sum(spent['tokens']) / sum(spent['seconds']):.0f} tokens/s")
                if repetition:
                    played.append(spent)
    result = {
        "device": jax.devices()[0].device_kind, "model": args.model, "prompt": args.prompt,
        "step": args.step, "levels": len(levels), "leaves": leaves, "page_size": args.page_size,
        "build_and_compile_seconds": round(built, 1), "compilations_after_warmup": compiled.count,
        **{way: _figures(played) for way, played in ways.items()},
    }  # fmt: skip
    ratio = result["tree"]["tokens_per_second"] / result["rows"]["tokens_per_second"]
    result["ratio"] = round(ratio, 3)
    print(
        f"{ratio:.2f} x the tokens a second; the selection takes "
        f"{result['tree']['select_share']:.1%} of a level's drawing",
        file=sys.stderr if args.json else sys.stdout,
    )
    if args.json:
        print(json.dumps(result))
    return 0


def _figures(played: list[dict[str, list[float]]]) -> dict[str, Any]:
    seconds = [sum(spent["seconds"]) for spent in played]
    tokens = sum(played[0]["tokens"])
    return {
        "tokens": int(tokens),
        "seconds": [round(s, 3) for s in seconds],
        "tokens_per_second": round(tokens / statistics.median(seconds), 1),
        "level_seconds": [round(s, 4) for s in played[-1]["seconds"]],
        "select_share": round(
            statistics.median(sum(s["select"]) / sum(s["seconds"]) for s in played), 4
        ),
        "pages": [int(n) for n in played[-1]["pages"]],
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
