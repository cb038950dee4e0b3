"""The commands as a person types them."""

import json
import os
import subprocess
import sys

import models_for_tests
import pytest

from kvjax.infer.cli import main


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


@pytest.mark.slow
def test_batch_from_a_shell(folder, tmp_path):
    """A process of its own: JSON last on stdout, no progress where nobody looks, status 0."""
    requests = [
        {"custom_id": str(i), "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 2}}
        for i in range(3)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(r) for r in requests))
    command = [sys.executable, "-m", "kvjax", "batch", "in.jsonl", "out.jsonl"]
    done = subprocess.run(
        [*command, "--model", folder, "--json", "--max-rows", "1"],
        cwd=tmp_path, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    figures = json.loads(done.stdout.splitlines()[-1])
    expected = {"requests": 3, "failed": 0, "output_tokens": 6, "compilations_after_warmup": 0}
    assert expected.items() <= figures.items()
    names = {"prompt_tokens", "prefill_tokens_computed", "seconds", "tokens_per_second"}
    assert names | {"peak_pages"} <= figures.keys()
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
