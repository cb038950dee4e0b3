"""Batch files: every request exactly once, whatever is wrong with the others."""

import json

import models_for_tests
import pytest

from kvjax.errors import InputError
from kvjax.infer import LLM
from kvjax.infer.batch import read_requests, run_batch


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models_for_tests.save_model(folder)
    return LLM.load(folder, max_rows=2, page_size=4, token_budget=64)


def chat(custom_id, content="hello", **body):
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion(custom_id, prompt="hello", **body):
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def write(path, records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(llm, tmp_path, records, model="m"):
    requests = read_requests(write(tmp_path / "in.jsonl", records))
    summary = run_batch(llm, requests, tmp_path / "out.jsonl", model=model)
    return summary, answers(tmp_path / "out.jsonl")


def test_answers_have_the_form_that_clients_read(llm, tmp_path):
    summary, lines = run(llm, tmp_path, [chat("a", temperature=0), completion("b"), chat("c")])
    assert (summary.requests, summary.failed, summary.resumed) == (3, 0, 0)
    by_id = {line["custom_id"]: line for line in lines}
    assert sorted(by_id) == ["a", "b", "c"]
    for name, line in by_id.items():
        body = line["response"]["body"]
        assert line["error"] is None and line["response"]["status_code"] == 200
        assert body["model"] == "m" and body["choices"][0]["finish_reason"] == "length"
        usage = body["usage"]
        assert usage["completion_tokens"] == 4
        assert usage["total_tokens"] == usage["prompt_tokens"] + 4
        assert ("message" in body["choices"][0]) == (name != "b")
    assert summary.output_tokens == 12


def test_broken_requests_fail_alone_and_say_where(llm, tmp_path):
    records = [
        "{not json",
        '["a list"]',
        completion("a"),
        {"custom_id": 3, "url": "/v1/completions", "body": {"prompt": "x"}},
        {"custom_id": "url", "url": "/v1/images", "body": {}},
        {"custom_id": "body", "url": "/v1/completions", "body": []},
        completion("n", n=2),
        completion("stop", stop=["x"]),
        completion("temperature", temperature="hot"),
        completion("boolean", max_tokens=True),
        completion("negative", max_tokens=-1),
        completion("long", prompt=[1] * 500),
        completion("ids", prompt=[1, 999]),
        completion("prompts", prompt=["two", "prompts"]),
        completion("a", prompt="again"),
        {"custom_id": "role", "url": "/v1/chat/completions", "body": {"messages": [{"x": 1}]}},
        {"custom_id": "none", "url": "/v1/chat/completions", "body": {"messages": []}},
        "",
        completion("b", n=1, stop=None, stream=False, user="me", logit_bias={}),
    ]
    summary, lines = run(llm, tmp_path, records)
    good = [line for line in lines if line["error"] is None]
    bad = {line["error"]["line"]: line for line in lines if line["error"]}
    assert sorted(line["custom_id"] for line in good) == ["a", "b"]
    assert sorted(bad) == [1, 2, *range(4, 18)]
    assert summary.failed == 16 and summary.requests == 18
    for number, line in bad.items():
        assert line["error"]["message"].startswith(f"line {number}: "), line
    assert bad[5]["custom_id"] == "url" and "/v1/images" in bad[5]["error"]["message"]
    assert '"n"' in bad[7]["error"]["message"]
    assert "500 tokens" in bad[12]["error"]["message"]
    assert "earlier line" in bad[15]["error"]["message"]


def test_an_interrupted_run_goes_on_and_repeats_nothing(llm, tmp_path):
    records = [completion(f"r{i}", prompt=f"request {i}") for i in range(7)]
    whole = {line["custom_id"]: line for line in run(llm, tmp_path, records)[1]}
    out = tmp_path / "out.jsonl"
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][: len(lines[3]) // 2])  # killed in mid-line
    summary, resumed = run(llm, tmp_path, records)
    assert (summary.requests, summary.resumed) == (7, 3)
    assert len(resumed) == 7
    for line in resumed:
        text = line["response"]["body"]["choices"][0]["text"]
        assert text == whole[line["custom_id"]]["response"]["body"]["choices"][0]["text"]
    # Nothing left: nothing is computed, nothing is lost.
    before = out.read_bytes()
    summary, _ = run(llm, tmp_path, records)
    assert summary.resumed == 7 and summary.output_tokens == 0 and out.read_bytes() == before


def test_failed_requests_are_tried_again(llm, tmp_path):
    run(llm, tmp_path, [completion("a"), completion("b", n=3)])
    summary, lines = run(llm, tmp_path, [completion("a"), completion("b")])
    assert (summary.resumed, summary.failed) == (1, 0)
    assert sorted(line["custom_id"] for line in lines) == ["a", "b"]


def test_other_peoples_files_are_left_alone(llm, tmp_path):
    run(llm, tmp_path, [completion("a")], model="one")
    with pytest.raises(InputError, match="answers of model 'one'"):
        run(llm, tmp_path, [completion("a")], model="two")
    precious = tmp_path / "out.jsonl"
    precious.write_text("my thesis\n")
    with pytest.raises(InputError, match="line 1 is no answer"):
        run(llm, tmp_path, [completion("a")])
    assert precious.read_text() == "my thesis\n"
    write(precious, [completion("a")])  # requests given as the output
    with pytest.raises(InputError, match="line 1 is no answer"):
        run(llm, tmp_path, [completion("a")])


def test_unusable_files_end_in_one_line(llm, tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_requests(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="no requests"):
        read_requests(write(tmp_path / "empty.jsonl", [""]))
    requests = read_requests(write(tmp_path / "in.jsonl", [completion("a")]))
    with pytest.raises(InputError, match="No such file"):
        run_batch(llm, requests, tmp_path / "no" / "folder" / "out.jsonl", model="m")
    with pytest.raises(InputError, match="No space left"):
        run_batch(llm, requests, _full_disk(), model="m")


def _full_disk():
    from pathlib import Path

    class Full(type(Path())):
        """/dev/full: every write fails as on a full disk."""

        def exists(self):
            return False

        def with_name(self, name):
            return Full("/dev/null")

        def replace(self, target):
            return None

    return Full("/dev/full")


def test_undrawn_seeds_do_not_depend_on_the_rest_of_the_file(llm, tmp_path):
    """A request without a seed keeps its answer when a run is resumed in another company."""
    records = [completion(f"r{i}", temperature=1.0) for i in range(4)]
    whole = {line["custom_id"]: line for line in run(llm, tmp_path, records)[1]}
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps(whole["r0"]) + "\n")
    _, lines = run(llm, tmp_path, records)
    for line in lines:
        assert (
            line["response"]["body"]["choices"]
            == whole[line["custom_id"]]["response"]["body"]["choices"]
        )
