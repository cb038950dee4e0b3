"""`kvjax eval`: answers from compressed caches, resumed runs, files from elsewhere."""

import dataclasses
import json

import numpy as np
import pytest

from kvjax.configs.task_prompts import make_prompts, needed
from kvjax.errors import InputError
from kvjax.infer import cli
from kvjax.infer.evaluate import Model, evaluate, read_answers
from kvjax.infer.evaluate_data import make_from_files
from kvjax.infer.evaluate_metrics import METRICS, wilson
from kvjax.infer.evaluate_policies import POLICIES, read_policy
from kvjax.infer.evaluate_results import show_table, summarize_answers
from kvjax.infer.evaluate_suite import Suite, read_suite
from kvjax.select import SnapKV, WindowKV
from kvjax.train.tasks import TASKS, Setting, make_task

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return Model.load("tiny")


def small(**changes):
    suite = Suite(
        make=make_prompts, tasks=("multi_key",), lengths=(256,), prompts=3, rows=4,
        policies=("full", "windowkv-tiny", "streaming", "oracle"), budgets=("1/1", "1/8"),
        protocols=("A", "B"),
    )  # fmt: skip
    return dataclasses.replace(suite, **changes)


@pytest.fixture(scope="module")
def lines(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "answers.jsonl"
    return evaluate(model, small(), path), path


def of(lines, **wanted):
    return [line for line in lines if all(line[key] == value for key, value in wanted.items())]


def test_the_whole_cache_answers_all_and_a_whole_budget_the_same(lines):
    for protocol in "AB":
        whole = [line["answer"] for line in of(lines[0], policy="full", protocol=protocol)]
        assert [x["score"] for x in of(lines[0], policy="full", protocol=protocol)] == [1.0] * 3
        for policy in ("windowkv-tiny", "streaming", "oracle"):
            same = of(lines[0], policy=policy, protocol=protocol, budget="1/1")
            assert [line["answer"] for line in same] == whole
            assert {line["recall"] for line in same} == {1.0}
            assert max(line["attention_error"] for line in same) < 1e-5


def test_bytes_are_within_the_budget_and_close_to_it(lines):
    for line in of(lines[0], budget="1/8"):
        assert 0.8 / 8 < line["bytes"] / line["bytes_full"] <= 1 / 8 + 1e-9
    for line in of(lines[0], budget="full"):
        assert line["bytes"] == line["bytes_full"]


def test_the_oracle_keeps_the_needles_and_answers(lines):
    for line in of(lines[0], policy="oracle", budget="1/8"):
        assert line["recall"] == 1.0
        assert line["score"] == 1.0
    assert min(x["recall"] for x in of(lines[0], policy="streaming", budget="1/8")) < 0.5


def test_an_interrupted_run_goes_on_where_it_was(model, lines, tmp_path):
    everything, path = lines
    text = path.read_text().splitlines(keepends=True)
    cut = tmp_path / "answers.jsonl"
    kept = [line for line in text if json.loads(line)["policy"] != "oracle"]
    cut.write_text("".join(kept) + text[-1][:40])  # and one that was not written to its end
    again = evaluate(model, small(), cut)
    timed = {"prefill_seconds", "select_seconds", "tokens_per_second"}
    plain = [{k: v for k, v in line.items() if k not in timed} for line in again]
    assert plain == [{k: v for k, v in line.items() if k not in timed} for line in everything]
    assert cut.read_text().startswith("".join(kept))
    assert len(list(read_answers(cut))) == len(everything)


def test_what_is_no_answer_is_said(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"task": 1}\n')
    with pytest.raises(InputError, match="line 1"):
        list(read_answers(path))


def test_what_is_read_may_be_less_than_what_is_held(lines, model, tmp_path):
    suite = small(policies=("mpcache",), budgets=("1/1", "1/8"), protocols=("A",))
    found = evaluate(model, suite, tmp_path / "answers.jsonl")
    whole = [line["answer"] for line in of(lines[0], policy="full", protocol="A")]
    assert [line["answer"] for line in of(found, budget="1/1")] == whole
    for line in of(found, budget="1/8"):
        assert 0.38 < line["bytes"] / line["bytes_full"] < 0.45
        # An eighth, and a vector of every page that is held: of pages of 4 tokens an eighth of 0.4.
        assert 0.15 < line["bytes_read"] / line["bytes_full"] < 0.19
    assert all(line["bytes_read"] == line["bytes"] for line in lines[0])


def test_results(lines):
    results = summarize_answers(lines[0])
    assert len(results) == 2 * 7
    full = next(r for r in results if r["policy"] == "full" and r["protocol"] == "A")
    assert full["accuracy"] == 1.0
    assert full["interval"] == [round(x, 4) for x in wilson(1.0, 3)]
    assert "lost" not in full
    oracle = next(r for r in results if r["policy"] == "oracle" and r["budget"] == "1/8")
    assert oracle["lost"] == [0.0, 0.0, 0.0]
    table = show_table(results)
    assert table.count("\n| streaming | 1/8 |") == 2


def test_wilson_as_published():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_metrics():
    assert METRICS["exact"](" 4719 ", ["4719"]) == 1.0
    assert METRICS["contains"]("it is ab", ["AB", "cd"]) == 0.5
    assert METRICS["contains_any"]("it is ab", ["AB", "cd"]) == 1.0
    assert METRICS["f1"]("the old cat", ["a cat, old and grey", "dog"]) == pytest.approx(2 / 3)


def test_policies_by_name():
    assert read_policy("snapkv:last=4,pooling=max") == SnapKV(last=4, pooling="max")
    shares = read_policy("windowkv:budgets=shares,shares=[[1,2],[3,4]]")
    assert isinstance(shares, WindowKV)
    assert shares.shares == ((1, 2), (3, 4))
    assert all(hash(read_policy(name)) for name in POLICIES if name != "full")
    with pytest.raises(InputError, match="no policy 'best'"):
        read_policy("best")
    with pytest.raises(InputError, match="no option 'size'"):
        read_policy("snapkv:size=3")


@pytest.mark.parametrize("task", TASKS)
def test_needles_hold_the_answer(model, task):
    prompt = next(make_prompts(model.tokenizer, task, 512, 5, 1))
    example = make_task(task, 5, 0, Setting(tokens=512, questions=1, fill=1.0))
    assert needed(example)
    assert prompt.needles
    held = " ".join(
        model.tokenizer.decode(prompt.context[start:end].tolist()) for start, end in prompt.needles
    )
    assert held.count(".") == len(prompt.needles)  # whole sentences
    if task == "counting":
        assert "went" in held
    else:
        words = [word.strip(",") for word in prompt.answers[0].split()]
        assert all(word in held for word in words if word.islower() or word.isdigit())
    whole = np.concatenate([prompt.context, prompt.question])
    asked = [{"role": "system", "content": example.document}]
    asked.append({"role": "user", "content": example.questions[0]})
    assert whole.tolist() == model.tokenizer.encode_chat(asked)


def test_files_of_longbench_and_ruler(model, tmp_path):
    longbench, ruler = tmp_path / "hotpotqa.jsonl", tmp_path / "niah.jsonl"
    context = "The code of the old owl is 4719. " * 20
    record = {"context": context, "input": "What is the code?", "answers": ["4719"]}
    longbench.write_text(json.dumps(record) + "\n")
    ruler.write_text(json.dumps({"input": context + "\nWhich?", "outputs": ["4719"]}) + "\n")
    make = make_from_files((longbench, ruler), 8)
    (one,) = make(model.tokenizer, "hotpotqa", 1024, 0, 5)
    (two,) = make(model.tokenizer, "niah", 1024, 0, 5)
    assert (one.metric, two.metric) == ("f1", "contains")
    assert "What is the code?" in model.tokenizer.decode(one.question.tolist())
    assert "4719" in model.tokenizer.decode(one.context.tolist())
    (cut,) = make(model.tokenizer, "hotpotqa", 64, 0, 5)
    assert len(cut.context) + len(cut.question) + 8 == 64
    assert cut.context[:20].tolist() == one.context[:20].tolist()
    longbench.write_text("{}\n")
    with pytest.raises(InputError, match=r"hotpotqa.jsonl, line 1: no \"answers\""):
        list(make(model.tokenizer, "hotpotqa", 64, 0, 5))


def test_the_command_writes_a_report(tmp_path, capsys):
    out = tmp_path / "out"
    status = cli.main(
        ["eval", "--tasks", "multi_key", "--lengths", "256", "--prompts", "2", "--rows", "4",
         "--policies", "full", "streaming", "--budgets", "1/8", "--out", str(out), "--json"]
    )  # fmt: skip
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0
    assert [r["policy"] for r in figures["results"]] == ["full", "streaming"]
    assert {"accuracy", "bytes", "bytes_full"} <= set(figures["results"][0])
    names = {path.name for path in out.iterdir()}
    assert {"answers.jsonl", "results.json", "report.html", "curves_256_A.png"} <= names
    assert "depth_A.png" in names
    assert "<table>" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "huge"], "no suite 'huge': use one of smoke, tiny"),
        (["--policies", "best"], "no policy 'best'"),
        (["--budgets", "much"], "no budget"),
        (["--tasks", "poetry"], "no tasks poetry"),
        (["--protocols", "C"], "no protocols C"),
        (["--data", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--lengths", "4096"], "4096 tokens: tiny was made for 2048"),
        (["--tags", "some"], "no tags 'some'"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, capsys):
    assert cli.main(["eval", "--json", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_suites_name_what_there_is():
    for name in ("smoke", "tiny"):
        suite = read_suite(name)
        assert set(suite.tasks) == set(TASKS)
        assert all(hash(read_policy(policy)) is not None for policy in suite.policies)
