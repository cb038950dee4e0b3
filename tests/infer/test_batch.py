"""Batch files: every request exactly once, whatever is wrong with the others."""

import contextlib
import dataclasses
import json
import resource

import models_for_tests
import pytest

from kvjax.cache import PageLedger
from kvjax.errors import InputError
from kvjax.infer import SamplingParams
from kvjax.infer.batch import run_batch
from kvjax.infer.batch_form import read_requests
from kvjax.infer.batch_output import open_output
from kvjax.infer.cli import main
from kvjax.infer.commands.shared import ModelOptions
from kvjax.infer.planners import make_planner
from kvjax.infer.sizes import choose_grid, choose_num_pages
from kvjax.plan import FirstCome


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models_for_tests.save_model(folder)
    return models_for_tests.lean_llm(folder)


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
    return [json.loads(line) for line in path.read_text().removesuffix("\n").split("\n")]


def run(llm, tmp_path, records, model="m"):
    requests = read_requests(write(tmp_path / "in.jsonl", records))
    with open_output(tmp_path / "out.jsonl", model) as output:
        summary = run_batch(llm, requests, output)
    return summary, answers(tmp_path / "out.jsonl")


@pytest.mark.slow
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
        completion("n", n="two"),
        completion("never", max_tokens=300),
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
    assert (summary.failed, summary.failed_ids, summary.requests) == (16, 12, 18)
    for number, line in bad.items():
        assert line["error"]["message"].startswith(f"line {number}: "), line
    assert bad[5]["custom_id"] == "url" and "/v1/images" in bad[5]["error"]["message"]
    assert '"n"' in bad[7]["error"]["message"]
    assert "300 to generate" in bad[8]["error"]["message"]
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
    run(llm, tmp_path, [completion("a"), completion("b", n=0), "{torn"])
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


def test_unusable_files_end_in_one_line(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_requests(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="no requests"):
        read_requests(write(tmp_path / "empty.jsonl", [""]))
    with (
        pytest.raises(InputError, match="No such file"),
        open_output(tmp_path / "no" / "folder" / "out.jsonl", "m"),
    ):
        pass
    with pytest.raises(InputError, match="Is a directory"), open_output(tmp_path, "m"):
        pass


@contextlib.contextmanager
def no_file_above(size):
    """A small disk: a write beyond so many bytes is cut short, the next one fails."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_leaves_whole_lines_and_the_next_run_goes_on(llm, tmp_path):
    records = [completion(f"r{i}") for i in range(6)]
    out = tmp_path / "out.jsonl"
    run(llm, tmp_path, records)
    whole = out.read_bytes()
    out.unlink()
    with (
        no_file_above(len(whole) * 2 // 5),
        pytest.raises(InputError, match="File too large: the answers so far are kept"),
    ):
        run(llm, tmp_path, records)
    assert whole.startswith(out.read_bytes()[:100]) and out.read_bytes().endswith(b"}\n")
    assert len(answers(out)) == 2
    summary, lines = run(llm, tmp_path, records)
    assert summary.resumed == 2
    assert sorted(line["custom_id"] for line in lines) == [f"r{i}" for i in range(6)]


def test_failed_lines_are_not_lost_when_there_is_no_room_to_rewrite(llm, tmp_path):
    run(llm, tmp_path, [completion("a"), completion("b", n=0)])
    before = (tmp_path / "out.jsonl").read_bytes()
    with (
        no_file_above(100),
        pytest.raises(InputError, match="File too large"),
        open_output(tmp_path / "out.jsonl", "m"),
    ):
        pass
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert not (tmp_path / "out.jsonl.tmp").exists()


def test_a_second_run_on_the_same_output_is_refused(llm, tmp_path):
    """Also while the first one's file is a new one in the place of what it found."""
    out = tmp_path / "out.jsonl"
    for records in ([completion("a", n=0)], [completion("a")], [completion("a")]):
        with (
            open_output(out, "m") as output,
            pytest.raises(InputError, match="another run is writing it"),
            open_output(out, "m"),
        ):
            pass
        with open_output(out, "m") as output:
            run_batch(llm, read_requests(write(tmp_path / "in.jsonl", records)), output)
    assert [line["custom_id"] for line in answers(out)] == ["a"]


def test_ids_that_are_no_text_are_kept(llm, tmp_path):
    record = json.dumps(completion("half \ud800"))
    for resumed in (0, 1):
        summary, lines = run(llm, tmp_path, [record])
        assert summary.resumed == resumed
        assert [line["custom_id"] for line in lines] == ["half \ud800"]


def test_all_choices_stand_in_one_line(llm, tmp_path):
    options = {"n": 3, "temperature": 1.0, "max_tokens": 5}
    _, lines = run(llm, tmp_path, [chat("other"), completion("a", **options), chat("b", **options)])
    by_id = {line["custom_id"]: line["response"]["body"] for line in lines}
    expected = llm.generate("hello", SamplingParams(n=3, temperature=1, max_tokens=5, seed=2 * 3))
    choices = by_id["a"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert [choice["text"] for choice in choices] == [answer.text for answer in expected]
    assert len({choice["message"]["content"] for choice in by_id["b"]["choices"]}) == 3
    generated = sum(len(answer.token_ids) for answer in expected)
    assert by_id["a"]["usage"] == {
        "prompt_tokens": 5, "completion_tokens": generated, "total_tokens": 5 + generated
    }  # fmt: skip


@pytest.mark.parametrize("policy", ["multi", "sorted-lru", "none"])
def test_a_plan_changes_the_order_and_no_answer(llm, tmp_path, policy):
    """Everything that requests of one batch may ask for, each for itself."""
    records = [
        completion("greedy", prompt="a document: one"),
        completion("drawn", prompt="a document: two", temperature=1.0, seed=7, max_tokens=9),
        completion("three", prompt="a document: two", temperature=0.8, n=3, top_p=0.9),
        completion("short", prompt="a document: one", max_tokens=1, logprobs=2),
        completion("biased", prompt="a document", logit_bias={"65": 3}, presence_penalty=1.0),
        completion("long", prompt="another", max_tokens=30, expected_tokens=5, ignore_eos=True),
        completion("scored", prompt="a document: one", echo=True, logprobs=1, max_tokens=3),
    ]
    plain = {line["custom_id"]: line["response"]["body"] for line in run(llm, tmp_path, records)[1]}
    (tmp_path / "out.jsonl").unlink()
    llm.engine.planner = make_planner(policy, llm.engine.grid, PageLedger(128))
    lines = run(llm, tmp_path, records)[1]
    llm.engine.planner = FirstCome(llm.engine.grid, PageLedger(128))  # knows of no page
    for line in lines:
        expected = plain.pop(line["custom_id"])
        assert line["response"]["body"]["choices"] == expected["choices"]
        assert line["response"]["body"]["usage"] == expected["usage"]
    assert not plain


def test_texts_and_tokens_that_end_an_answer(llm, tmp_path):
    (whole,) = llm.generate("hello", SamplingParams(max_tokens=20))
    stop, end = whole.text[4:6], whole.token_ids[3]
    _, lines = run(
        llm, tmp_path,
        [
            completion("text", max_tokens=20, stop=stop),
            completion("id", max_tokens=20, stop_token_ids=[end]),
            completion("never", max_tokens=20, logit_bias={str(whole.token_ids[0]): -100}),
        ],
    )  # fmt: skip
    choices = {line["custom_id"]: line["response"]["body"]["choices"][0] for line in lines}
    assert choices["text"]["text"] == whole.text[: whole.text.index(stop)]
    assert choices["text"]["finish_reason"] == choices["id"]["finish_reason"] == "stop"
    assert whole.text.startswith(choices["id"]["text"]) and len(choices["id"]["text"]) < 20
    assert choices["never"]["text"] != whole.text


def test_given_text_is_scored_in_three_ways(llm, tmp_path):
    """By the score url, by echo without an answer, and by log-probabilities of the prompt."""
    text, rest = "hello, ", "world"
    (score,) = llm.score([text], [rest])
    body = {"prompt": text, "continuation": rest}
    _, lines = run(
        llm, tmp_path,
        [
            {"custom_id": "score", "url": "/v1/score", "body": body},
            completion("echo", text + rest, echo=True, logprobs=1, max_tokens=0),
            completion("prompt", text + rest, prompt_logprobs=0, max_tokens=1),
        ],
    )  # fmt: skip
    bodies = {line["custom_id"]: line["response"]["body"] for line in lines}
    expected = pytest.approx(list(score.token_logprobs), abs=1e-5)  # float32, and 6 decimals
    assert bodies["score"]["token_logprobs"] == expected
    assert bodies["score"]["tokens"] == list(rest)
    assert bodies["score"]["logprob"] == pytest.approx(score.logprob, abs=1e-4)
    assert bodies["score"]["usage"]["completion_tokens"] == 0
    echo = bodies["echo"]["choices"][0]
    assert echo["text"] == text + rest and echo["finish_reason"] == "length"
    assert echo["logprobs"]["token_logprobs"][len(text) :] == expected
    assert echo["logprobs"]["text_offset"] == list(range(len(text + rest)))
    shown = bodies["prompt"]["choices"][0]["prompt_logprobs"]
    assert shown[0] is None
    assert [next(iter(x.values()))["logprob"] for x in shown[len(text) :]] == expected


@pytest.fixture(scope="module")
def tight(tmp_path_factory):
    """A cache of five pages of four tokens, and not a byte more than it takes."""
    folder = tmp_path_factory.mktemp("tight")
    config = models_for_tests.save_model(folder)
    page = 2 * config.num_layers * config.num_kv_heads * 4 * config.head_dim * 4
    table = 4 * 2 * (64 + 1) + 4 * 2  # 2 rows of 256 tokens: pages, lengths, positions
    return models_for_tests.lean_llm(folder, kv_memory=6 * page + table - 1)


@pytest.mark.slow
@pytest.mark.parametrize("optimistic", [False, True])
def test_a_small_cache_answers_what_fits_and_refuses_what_never_will(
    llm, tight, tmp_path, optimistic
):
    records = [completion(f"r{i}", prompt=f"no. {i}", max_tokens=15) for i in range(5)]
    never = [
        completion("prompt", prompt="x" * 21),
        completion("answer", prompt="x" * 10, max_tokens=12),
        {"custom_id": "s", "url": "/v1/score", "body": {"prompt": "x" * 20, "continuation": "y"}},
    ]
    planner = FirstCome(tight.engine.grid, PageLedger(5), optimistic=optimistic)
    tight.engine.planner = planner
    pool = tight.engine.state.pool
    held = pool.k.nbytes + pool.v.nbytes
    places = {pool.k.unsafe_buffer_pointer(), pool.v.unsafe_buffer_pointer()}
    summary, lines = run(tight, tmp_path, [*never, *records])
    pool = tight.engine.state.pool
    # The pool never moved: no step had a second one beside it.
    assert places == {pool.k.unsafe_buffer_pointer(), pool.v.unsafe_buffer_pointer()}
    assert held == 5 * tight.engine.cache.page_bytes("cpu") and planner.ledger.peak <= 5
    assert summary.failed == 3 and planner.ledger.held == 0
    assert (planner.preemptions > 0) == optimistic
    failed = [line["custom_id"] for line in lines if line["error"]]
    assert failed == ["prompt", "answer", "s"]
    assert "20" in lines[1]["error"]["message"] and "KV memory" in lines[1]["error"]["message"]
    (tmp_path / "out.jsonl").unlink()
    ample = {line["custom_id"]: line for line in run(llm, tmp_path, records)[1]}
    for line in lines[3:]:
        choices = line["response"]["body"]["choices"]
        assert choices == ample[line["custom_id"]]["response"]["body"]["choices"]


def test_memory_that_the_machine_has_not_is_refused_before_anything_runs():
    model = dataclasses.replace(models_for_tests.CONFIG, num_layers=100_000, windows=())
    grid = choose_grid(2**17, 64, 16, None, 8)
    with pytest.raises(InputError, match="bytes of KV memory asked for, but"):
        choose_num_pages(model, grid, 2**60)


def test_a_saved_beginning_is_not_computed(llm, tmp_path, monkeypatch, capsys):
    """The command with the engine at hand, which knows nothing of the beginning any more."""
    document = "a document of some length, which several requests share"
    llm.save_prefix(document, tmp_path / "prefix")
    write(tmp_path / "in.jsonl", [completion("a", document + " a"), completion("b", document)])
    computed = []
    for options in ([], ["--prefix", str(tmp_path / "prefix")]):
        planner = llm.engine.planner = FirstCome(llm.engine.grid, PageLedger(128))
        monkeypatch.setattr(ModelOptions, "load", lambda *_, **__: llm)
        out = tmp_path / f"out{len(options)}.jsonl"
        assert main(["batch", str(tmp_path / "in.jsonl"), str(out), "--json", *options]) == 0
        figures = json.loads(capsys.readouterr().out)
        computed.append(figures["prefill_tokens_computed"])
        assert planner.ledger.held == 0
    first, second = (answers(tmp_path / f"out{n}.jsonl") for n in (0, 2))
    for a, b in zip(first, second, strict=True):
        assert a["response"]["body"]["choices"] == b["response"]["body"]["choices"]
    # Pages of four; the last token of a prompt is computed in any case.
    assert computed == [len(document) + 2 + 3, 2 + 3 + 3]


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
