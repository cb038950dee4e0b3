"""`kvjax batch`, killed at any moment: run again, it goes on and repeats nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from kvjax.infer import LLM, SamplingParams

pytestmark = pytest.mark.slow

DOCUMENT = "The code of the red heron is 2350. The code of the blue falcon is 8841."
COUNT = 24


def body(i):
    """Greedy answers of 40 to 118 tokens; every tenth request wants two."""
    return {
        "prompt": f"{DOCUMENT} What is the code of the {('red', 'blue')[i % 2]} heron? {i}",
        "max_tokens": 40 + 2 * i, "temperature": 0, "ignore_eos": True, "n": 1 + (i % 10 == 0),
    }  # fmt: skip


def start(folder, *options):
    command = [sys.executable, "-m", "kvjax", "batch", "in.jsonl", "out.jsonl", "--model", "tiny"]
    return subprocess.Popen(
        [*command, "--max-rows", "2", *options],
        cwd=folder, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def whole_lines(path: Path):
    """What is in the output at this moment; a last line may be cut."""
    data = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def kill_after(process, path, new_lines, seconds):
    """SIGKILL some seconds after the run has written so many lines."""
    before = len(whole_lines(path))
    while process.poll() is None and len(whole_lines(path)) < before + new_lines:
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def test_killed_at_random_moments_every_request_is_answered_once(tmp_path):
    """Kills at the start and between answers, and a line torn in its middle by hand: a line is one
    write, which no kill we could time has ever cut."""
    draw = random.Random(0)
    requests = [
        {"custom_id": f"r{i}", "url": "/v1/completions", "body": body(i)} for i in range(COUNT)
    ]
    lines = [json.dumps(request) for request in requests]
    lines.insert(7, "{this is no request")
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"

    killed, kept = 0, []
    for new_lines in (0, 5, 4):
        seconds = draw.uniform(0, 0.2 if new_lines else 4.0)
        killed += kill_after(start(tmp_path), out, new_lines, seconds)
        found = [line["custom_id"] for line in whole_lines(out) if line["error"] is None]
        assert found[: len(kept)] == kept  # what was answered stays, byte by byte in its place
        assert max(Counter(found).values(), default=1) == 1
        kept = found
        if new_lines == 5:
            torn = out.read_bytes().split(b"\n")[-2][:200]
            with out.open("ab") as file:
                file.write(torn)
    assert killed == 3 and 0 < len(kept) < COUNT

    last = start(tmp_path, "--json")
    stdout, stderr = last.communicate()
    assert last.returncode == 1, stderr  # the line that is no request failed
    figures = json.loads(stdout.splitlines()[-1])
    expected = {"requests": COUNT + 1, "resumed": len(kept), "failed": 1, "failed_ids": 0}
    assert expected.items() <= figures.items() and figures["compilations_after_warmup"] == 0
    answers = whole_lines(out)
    (error,) = [line["error"] for line in answers if line["error"]]
    assert error["line"] == 8 and error["message"].startswith("line 8: ")
    by_id = {line["custom_id"]: line["response"]["body"] for line in answers if not line["error"]}
    assert len(answers) == COUNT + 1 and by_id.keys() == {f"r{i}" for i in range(COUNT)}

    llm = LLM.load("tiny", max_rows=2)
    prompts = [request["body"]["prompt"] for request in requests]
    params = [SamplingParams(max_tokens=40 + 2 * i, ignore_eos=True) for i in range(COUNT)]
    for i, answer in enumerate(llm.generate(prompts, params)):
        texts = {choice["text"] for choice in by_id[f"r{i}"]["choices"]}
        assert texts == {answer.text}
        assert by_id[f"r{i}"]["usage"]["completion_tokens"] == (40 + 2 * i) * (1 + (i % 10 == 0))
