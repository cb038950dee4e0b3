"""The commands as a person types them."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import termios

import models_for_tests
import pytest

from kvjax.infer.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    models_for_tests.save_model(path)
    return str(path)


def test_help_lists_the_commands(capsys):
    assert main([]) == 0
    assert main(["--help"]) == 0
    assert "batch" in capsys.readouterr().out


def test_every_command_explains_itself(capsys):
    for command in ("generate", "batch"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert "--kv-memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["fly"], "no command 'fly'"),
        (["train", "dog"], "no command 'train dog'"),
        (["generate", "hi", "--model", "nowhere"], "no model 'nowhere'"),
        (["generate", "hi", "--kv-memory", "lots"], "'lots' is no size"),
        (["generate", "hi", "--temperature", "-1"], "temperature must be"),
        (["generate", "hi", "--min-p", "2"], "min_p must be"),
        (["generate", "hi", "--logprobs", "2"], "--logprobs is shown by --json"),
        (["generate", "hi", "--file", "x"], "give one of them"),
        (["generate", "--file", "/no/such/file"], "/no/such/file: No such file"),
        (["batch", "/no/such/file", "out"], "/no/such/file: No such file"),
        (["batch", __file__, "/no/such/file"], "/no/such/file: No such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, said, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("kvjax: error: ") and err.count("\n") == 1


def test_generate_prints_the_answer_and_json_its_figures(folder, capsys, tmp_path):
    options = ["--model", folder, "--max-tokens", "5"]
    assert main(["generate", "hello", *options]) == 0
    text = capsys.readouterr().out
    assert main(["generate", "hello", *options, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["text"] + "\n" == text and figures["output_tokens"] == 5
    assert figures["compilations_after_warmup"] == 0
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("user: hello\n")
    assert main(["generate", "--file", str(prompt), "--raw", *options]) == 0
    assert capsys.readouterr().out == text


def test_generate_shows_every_token_as_it_comes(folder, monkeypatch):
    class Terminal(io.StringIO):
        """Counts what it is given."""

        pieces = 0

        def write(self, text):
            self.pieces += bool(text)
            return super().write(text)

    monkeypatch.setattr("sys.stdout", out := Terminal())
    assert main(["generate", "hello", "--model", folder, "--max-tokens", "9"]) == 0
    assert out.pieces >= 6  # nine tokens, of which some may be parts of a character


def test_generate_takes_every_option_of_sampling(folder, capsys):
    def generate(*options):
        assert main(["generate", "hello", "--model", folder, "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    plain = generate("--max-tokens", "8", "--logprobs", "2")
    assert len(plain["logprobs"]) == 8
    for entry in plain["logprobs"]:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
        assert len(entry["top_logprobs"]) == 2
    one_token = ["--top-k", "1", "--temperature", "5", "--min-p", "0.1", "--top-p", "0.9"]
    assert generate("--max-tokens", "8", *one_token)["text"] == plain["text"]
    stops = [plain["text"][4:6], plain["text"][2:4]]
    ended = generate("--max-tokens", "8", "--stop", stops[0], "--stop", stops[1])
    assert ended["text"] == plain["text"][: min(plain["text"].index(stop) for stop in stops)]
    assert ended["finish_reason"] == "stop" and "logprobs" not in ended
    penalties = ["--repetition-penalty", "9", "--presence-penalty", "9"]
    punished = generate("--max-tokens", "8", *penalties, "--frequency-penalty", "9")
    assert punished["text"] != plain["text"]


def batch(folder, model, out, **options):
    """A process of its own."""
    command = [sys.executable, "-m", "kvjax", "batch", "in.jsonl", out, "--model", model, "--json"]
    return subprocess.run(
        [*command, "--max-rows", "1", "--kv-memory", "100KiB"],
        cwd=folder, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True, **options,
    )  # fmt: skip


def test_batch_from_a_shell(folder, tmp_path):
    """Progress where somebody looks, JSON last on stdout, a status; a full disk is one line."""
    requests = [
        {"custom_id": str(i), "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 2}}
        for i in range(3)
    ]
    lines = [json.dumps(request) for request in requests]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "no request"]))
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    done = batch(tmp_path, folder, "out.jsonl", stdout=subprocess.PIPE, stderr=end)
    os.close(end)
    bar = os.read(terminal, 2**16).decode().replace("\r\n", "\n").split("\r")[-1]
    os.close(terminal)
    assert done.returncode == 1, bar
    assert "4/4" in bar and "1 failed" in bar and re.search(r"\d tokens/s", bar)
    figures = json.loads(done.stdout.splitlines()[-1])
    expected = {
        "requests": 4, "resumed": 0, "failed": 1, "failed_ids": 0, "output_tokens": 6,
        "preemptions": 0, "compilations_after_warmup": 0, "pages": 8,
    }  # fmt: skip
    assert expected.items() <= figures.items()
    names = {"prompt_tokens", "prefill_tokens_computed", "seconds", "tokens_per_second"}
    assert names <= figures.keys()
    assert 0 < figures["peak_pages"] <= 8 and 90 * 1024 < figures["kv_bytes"] <= 100 * 1024
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4

    full = batch(tmp_path, folder, "/dev/full", capture_output=True)
    assert full.returncode == 2 and full.stdout == ""
    assert full.stderr.startswith("kvjax: error: /dev/full: No space left on device")
    assert full.stderr.count("\n") == 1  # and no progress where nobody looks
