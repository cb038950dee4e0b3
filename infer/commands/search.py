"""`kvjax search`: solves questions by tree search."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from kvjax.errors import InputError
from kvjax.infer.commands import guard_search
from kvjax.infer.commands.shared import parse_arguments, parse_bytes, warm_up
from kvjax.infer.llm import LLM, find_model
from kvjax.infer.sampling import SamplingParams
from kvjax.infer.search.answers import Choice, choose
from kvjax.infer.search.loop import Cost, Searched, SearchParams, search
from kvjax.infer.search.methods import MethodOptions
from kvjax.infer.search.picture import tree_json, tree_svg
from kvjax.infer.search.rows import Reward
from kvjax.infer.search.tasks import TASKS, SearchTask, as_prompt
from kvjax.models.reward import read_reward

__all__ = [
    "Question", "Search", "least_page", "load_models", "main", "read_questions", "search_all",
]  # fmt: skip

# Tokens of a work item on a CPU: a longer one costs its whole length however short the row is.
_SPLIT_TOKENS = 64


def least_page() -> int:
    """4; on an accelerator 8, since its kernels take no smaller pages and all else crawls."""
    return 4 if jax.default_backend() == "cpu" else 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search(MethodOptions):
    """Solve questions by tree search, guided by a reward model.

    With --prompts FILE instead of --questions every next token is rated (Saffron): see
    `kvjax search --prompts x --help`.
    """

    questions: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A question a line: text, or JSON with "question" and perhaps "answer". By default standard
    input."""
    policy_model: Annotated[str, tyro.conf.arg(name="policy", metavar="MODEL")] = "countdown"
    """Draws the steps: a folder or a built-in model (countdown)."""
    reward: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Judges them: a folder with reward.json; by default the policy itself."""
    task: str = "countdown"
    """How steps end and answers are read: countdown, countdown-deep, math."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A JSON object for each question: its solution and what the search took."""
    trees: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """The tree of each question, as JSON and as a picture (SVG)."""
    at_a_time: int = 8
    """Questions that are searched together."""
    sampling_temperature: float = 1.0
    """Of the policy's draws."""
    seed: int = 0
    """Of the draws. A question's tree depends on it and on the question's place in the file."""
    dtype: str | None = None
    """float32 or bfloat16; by default as the weights are stored, on the CPU float32."""
    kv_memory: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
    """Memory for the KV cache, such as 512MiB or 2GiB."""
    page_size: int = dataclasses.field(default_factory=least_page)
    """Tokens of a page: small, since what steps share is short."""
    shared_reads: bool = False
    """Read pages that leaves share once for all of them: faster where questions are long. The last
    bits of a result then depend on what else is searched."""
    json: bool = False
    """End with one JSON object on stdout."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, and the expected answer where it is known."""

    text: str
    answer: str | None = None


def read_questions(path: Path | None) -> list[Question]:
    """The questions of a file, or of standard input.

    Raises:
        InputError: it cannot be read, or has none.
    """
    if path is None and sys.stdin.isatty():
        raise InputError("no questions: give --questions FILE, or write them to standard input")
    try:
        text = sys.stdin.read() if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({e}): give a text file") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            found.append(Question(line.strip()))
            continue
        try:
            fields = json.loads(line)
            answer = fields.get("answer")
            found.append(Question(fields["question"], None if answer is None else str(answer)))
        except (ValueError, KeyError):
            raise InputError(f'{path}: line {number} is no JSON with "question"') from None
    if not found:
        raise InputError(f"{path or 'standard input'}: no questions in it")
    return found


def load_models(
    policy: str, reward: str | None, *, rows: int, page_size: int, dtype: str | None,
    kv_memory: str | None, shared_reads: bool = False,
) -> tuple[LLM, Reward]:  # fmt: skip
    """The policy and the reward model; one model and one cache where they are the same."""
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    memory = None if kv_memory is None else parse_bytes(kv_memory)
    options: dict[str, Any] = {
        "dtype": dtype, "max_rows": rows, "page_size": page_size, "kv_memory": memory,
        "grouped": shared_reads,
    }  # fmt: skip
    same = reward is None or find_model(reward) == find_model(policy)
    head = read_reward(find_model(reward or policy))
    if not same and memory is None and jax.default_backend() != "cpu":
        options["kv_memory"] = 8 * 2**30  # else the first takes what the second needs
    llm = _few_shapes(LLM.load(policy, **options))
    return llm, Reward(llm if same else _few_shapes(LLM.load(str(reward), **options)), head)


def _few_shapes(llm: LLM) -> LLM:
    """A search has many rows at a time, nearly always, and they are short."""
    grid, cpu = llm.engine.grid, jax.default_backend() == "cpu"
    rows = grid.max_rows
    grid = dataclasses.replace(
        grid, plain=False, row_buckets=(max(1, rows // 4), rows) if cpu and rows > 1 else (rows,),
        token_buckets=(max(rows, 256),) if cpu else grid.token_buckets[-1:],
        split_pages=max(1, _SPLIT_TOKENS // grid.page_size) if cpu else min(
            grid.split_pages, grid.pages_per_row
        ),
    )  # fmt: skip
    llm.engine.grid = llm.engine.planner.grid = grid  # nothing is compiled yet
    return llm


def search_all(
    llm: LLM, reward: Reward, task: SearchTask, options: MethodOptions,
    questions: Sequence[Question], *, at_a_time: int, seed: int, temperature: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[list[Searched], list[Choice], list[Cost]]:  # fmt: skip
    """Searches questions in groups; trees, choices, and the cost of each group."""
    policy = options.policy(llm, task)
    params = SearchParams(
        width=options.width, step_ends=task.step_ends, step_tokens=task.step_tokens,
        max_tokens=task.max_tokens, finished=task.finished, merge=options.merge, seed=seed,
        sampling=SamplingParams(temperature=temperature),
    )  # fmt: skip
    for question in questions:
        task.check(question.text)
    trees: list[Searched] = []
    costs = []
    for first in range(0, len(questions), at_a_time):
        group = [as_prompt(llm, q.text) for q in questions[first : first + at_a_time]]
        found, cost = search(llm, group, policy, reward, params, first=first)
        trees += found
        costs.append(cost)
        progress(len(trees), len(questions))
    vote = options.vote(task)
    choices = [
        choose(tree.ended, vote=vote, extract=task.extract, same=task.same) for tree in trees
    ]
    return trees, choices, costs


def _record(task: SearchTask, question: Question, tree: Searched, choice: Choice) -> dict[str, Any]:
    text = choice.leaf.answer() if choice.leaf else ""
    known = question.answer is not None or task.state is not None
    levels = tree.levels
    return {
        "question": question.text,
        "answer": choice.answer or None,
        "solution": text or None,
        "score": round(choice.leaf.score, 6) if choice.leaf else None,
        "right": task.right(question.text, text, question.answer) if known else None,
        "solutions": sum(leaf.count for leaf in tree.ended),
        "levels": len(levels),
        "tokens": tree.tokens,
        "calls": tree.calls,
        "kv_pre": [level.before.nodes for level in levels],
        "kv_live": [level.after.nodes for level in levels],
        "kv_unique": [level.after.unique for level in levels],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    With --prompts it is a search by tokens, see `guard_search`.
    """
    words = sys.argv[1:] if argv is None else argv
    if any(word == "--prompts" or word.startswith("--prompts=") for word in words):
        return guard_search.main(words)
    args = parse_arguments(Search, "kvjax search", argv)
    if args.task not in TASKS:
        raise InputError(f"no task {args.task!r}: use one of {', '.join(TASKS)}")
    if args.at_a_time < 1:
        raise InputError(f"--at-a-time must be 1 or more, not {args.at_a_time}")
    task = TASKS[args.task]
    args.check(task)
    questions = read_questions(args.questions)
    for question in questions:
        task.check(question.text)
    rows = min(512, max(8, args.width * min(args.at_a_time, len(questions))))
    llm, reward = load_models(
        args.policy_model, args.reward, rows=rows, page_size=args.page_size, dtype=args.dtype,
        kv_memory=args.kv_memory, shared_reads=args.shared_reads,
    )  # fmt: skip
    for model in {id(m): m for m in (llm, reward.llm)}.values():
        warm_up(model)
    start = time.perf_counter()
    trees, choices, costs = search_all(
        llm, reward, task, args, questions, at_a_time=args.at_a_time, seed=args.seed,
        temperature=args.sampling_temperature,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    records = [_record(task, *each) for each in zip(questions, trees, choices, strict=True)]
    _write(args, records, trees, choices)
    _report(args, records, costs, seconds)
    return 0


def _write(
    args: Search, records: list[dict[str, Any]], trees: list[Searched], choices: list[Choice]
) -> None:
    try:
        if args.out is not None:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            args.out.write_text(lines, encoding="utf-8")
        if args.trees is not None:
            args.trees.mkdir(parents=True, exist_ok=True)
            for number, (tree, choice) in enumerate(zip(trees, choices, strict=True)):
                path = args.trees / f"tree_{number:04}"
                text = json.dumps(tree_json(tree.root), indent=1)
                path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
                picture = tree_svg(tree.root, choice.leaf)
                path.with_suffix(".svg").write_text(picture, encoding="utf-8")
    except OSError as e:
        raise InputError(f"{e.filename}: cannot be written ({e.strerror})") from None


def _report(args: Search, records: list[dict[str, Any]], costs: list[Cost], seconds: float) -> None:
    known = [record["right"] for record in records if record["right"] is not None]
    page_bytes = costs[0].page_bytes
    figures = {
        "questions": len(records),
        "answered": sum(record["answer"] is not None for record in records),
        "right": sum(known) if known else None,
        "tokens": sum(record["tokens"] for record in records),
        "calls": sum(record["calls"] for record in records),
        "seconds": round(seconds, 3),
        "policy_seconds": round(sum(cost.policy_seconds for cost in costs), 3),
        "reward_seconds": round(sum(cost.reward_seconds for cost in costs), 3),
        "select_seconds": round(sum(cost.select_seconds for cost in costs), 3),
        "pages_peak": max(cost.pages_peak for cost in costs),
        "kv_peak_bytes": max(cost.pages_peak for cost in costs) * page_bytes,
    }
    if args.json:
        print(json.dumps(figures))
        return
    if args.out is None:
        for record in records:
            print(f"{record['question']}  {record['solution'] or '(nothing found)'}")
    right = f", {figures['right']} of {len(known)} right" if known else ""
    print(
        f"{figures['answered']} of {len(records)} questions answered{right}, in {seconds:.1f} s; "
        f"{figures['tokens']} tokens drawn, at most {figures['pages_peak']} pages of "
        f"{args.page_size} tokens held"
    )
