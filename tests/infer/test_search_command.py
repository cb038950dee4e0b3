"""`kvjax search` as it is typed, with the built-in model."""

import dataclasses
import json
import xml.etree.ElementTree as ET

import pytest

from kvjax.errors import InputError
from kvjax.infer.bench import search as bench
from kvjax.infer.bench.search import bootstrap_interval
from kvjax.infer.cli import main
from kvjax.infer.commands.search import Question, read_questions
from kvjax.infer.search import ETS, Rebase
from kvjax.infer.search.methods import METHODS, MethodOptions, read_method
from kvjax.infer.search.tasks import TASKS
from kvjax.models.countdown.game import judge, problem, read_problem

pytestmark = pytest.mark.slow


def test_the_built_in_model_solves_problems(tmp_path, capsys):
    questions = tmp_path / "questions.txt"
    problems = [problem(6_000_000, index)[0] for index in range(4)]
    questions.write_text("".join(p.text + "\n" for p in problems))
    out, trees = tmp_path / "out.jsonl", tmp_path / "trees"
    words = ["search", "--questions", str(questions), "--width", "8", "--at-a-time", "1"]
    words += ["--clusters", "state", "--out", str(out), "--trees", str(trees), "--json"]
    assert main(words) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["question"] for record in records] == [p.text for p in problems]
    for record in records:
        right = judge(read_problem(record["question"]), record["solution"] or "")
        assert record["right"] == right
        assert len(record["kv_pre"]) == record["levels"]
        assert all(a <= b for a, b in zip(record["kv_live"], record["kv_pre"], strict=True))
    # Alone the model solves a quarter; that all four fail has a chance of about 1 in 100.
    assert figures["right"] == sum(record["right"] for record in records) >= 1
    assert figures["pages_peak"] > 0
    assert len(list(trees.glob("*.json"))) == len(list(trees.glob("*.svg"))) == 4
    ET.parse(trees / "tree_0000.svg")
    told = json.loads((trees / "tree_0000.json").read_text())
    assert told["width"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "chess"], "no task 'chess'"),
        (["--method", "guess"], "no method 'guess'"),
        (["--policy", "nowhere"], "no model 'nowhere'"),
        (["--policy", "tiny"], "no reward.json"),
        (["--width", "0"], "width is 0"),
        (["--clusters", "colour"], "no clusters 'colour'"),
        (["--cost", "money"], "'money'"),
        (["--at-a-time", "0"], "--at-a-time"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(tmp_path, capsys, words, message):
    questions = tmp_path / "questions.txt"
    questions.write_text("3 7 10 2 5>22\n")
    assert main(["search", "--questions", str(questions), *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_question_of_another_kind_is_refused(tmp_path, capsys):
    questions = tmp_path / "questions.txt"
    questions.write_text("What is the code of the bear?\n")
    assert main(["search", "--questions", str(questions)]) == 2
    assert "no problem of Countdown" in capsys.readouterr().err


def test_questions_are_lines_of_text_or_json(tmp_path):
    path = tmp_path / "questions"
    path.write_text('1 2>3\n\n{"question": "a", "answer": 4}\n')
    assert read_questions(path) == [Question("1 2>3"), Question("a", "4")]
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match="line 1"):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="no questions"):
        read_questions(path)


def test_runs_are_read_from_words():
    options = read_method("ets,width=64,lambda_b=1.5,floor_one=no,clusters=none")
    assert options == MethodOptions(
        method="ets", width=64, lambda_b=1.5, floor_one=False, clusters="none"
    )
    task = TASKS["countdown"]
    assert options.policy(None, task) == ETS(lambda_b=1.5, floor_one=False)
    assert read_method("rebase,temperature=0.4").policy(None, task) == Rebase(0.4)
    assert all(MethodOptions(method=name, clusters="none").policy(None, task) for name in METHODS)
    assert MethodOptions(method="majority").vote(task) == "majority"
    # A wide level is solved on the device, in its time; nothing is compiled before it is asked.
    wide = read_method("ets,width=256,clusters=none")
    assert wide.policy(None, task).program.leaves == 256
    assert dataclasses.replace(wide, width=128).policy(None, task).program is None
    assert dataclasses.replace(wide, solver="exact").policy(None, task).program is None
    for wrong in ("ets,speed=1", "ets,width=wide", "ets,floor_one=perhaps"):
        with pytest.raises(InputError, match="no option"):
            read_method(wrong)


def test_intervals_of_paired_differences():
    import numpy as np

    rng = np.random.default_rng(0)
    b = (rng.random(400) < 0.5).astype(float)
    low, high = bootstrap_interval(b, b)
    assert low == high == 0
    a = np.maximum(b, (rng.random(400) < 0.2).astype(float))
    low, high = bootstrap_interval(a, b)
    assert 0.05 < low < (a - b).mean() < high < 0.15


def test_a_measurement_goes_on_where_it_was_cut_off(tmp_path, capsys, monkeypatch):
    """Figures are kept as soon as they are there, and only those of the same settings count."""
    measured = []

    def measure(args, llm, reward, task, options, questions, progress):
        measured.append(options.width)
        if options.width == 4 and len(measured) == 2:
            raise KeyboardInterrupt
        return {"accuracy": 0.5, "coverage": 0.5, "seconds": 1.0, "solved": "01"}

    class Idle:
        llm = None

    monkeypatch.setattr(bench, "load_models", lambda *args, **options: (None, Idle))
    monkeypatch.setattr(bench, "warm_up", lambda model: None)
    monkeypatch.setattr(bench, "_measure", measure)
    words = ["--problems", "2", "--width", "2", "--out", str(tmp_path / "runs.jsonl"), "--json"]
    words += ["--runs", "rebase", "rebase,width=4"]
    with pytest.raises(KeyboardInterrupt):
        bench.main(words)
    assert bench.main(words) == 0
    assert measured == [2, 4, 4]
    result = json.loads(capsys.readouterr().out)
    assert list(result["runs"]) == ["rebase", "rebase,width=4"]
    assert result["runs"]["rebase,width=4"]["against_reference"] == [0, 0, 0]
    assert bench.main(words) == 0
    assert bench.main([*words, "--problem-seed", "5"]) == 0
    assert measured == [2, 4, 4, 2, 4]
    (tmp_path / "runs.jsonl").write_text("1 2>3\n")
    with pytest.raises(InputError, match="no file of kvjax bench search"):
        bench.main(words)
