"""The demo's requests: made of a task, and what its command writes."""

import json
import re
from pathlib import Path

import pytest

from kvjax.train.tasks.demo import DOCUMENTS, MIXTURE, SEED, main, make_requests

DEMOS = Path(__file__).parents[2] / "demos"


def test_requests_interleave_the_documents():
    requests, answers = make_requests(1, 3, MIXTURE)
    names = [request["custom_id"] for request in requests]
    assert names[:4] == ["doc0-q0", "doc1-q0", "doc2-q0", "doc0-q1"]
    assert names == [answer["custom_id"] for answer in answers]
    assert len(set(names)) == 3 * 8
    for request, answer in zip(requests, answers, strict=True):
        system, user = request["body"]["messages"]
        (key,) = re.findall(r"What is the (.*)\?", user["content"])
        (value,) = re.findall(rf"The {key} is (\d{{4}})\.", system["content"])
        assert value == answer["answer"]


@pytest.mark.parametrize("name", ["requests.jsonl", "expected.jsonl"])
def test_the_demo_is_what_the_command_writes(name, tmp_path):
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / name).read_bytes() == (DEMOS / name).read_bytes()
    lines = (DEMOS / name).read_text().splitlines()
    assert len({json.loads(line)["custom_id"] for line in lines}) == 64


def test_the_demo_has_documents_of_its_own():
    trained = {MIXTURE.make(0, i).document for i in range(DOCUMENTS)}
    demo = {MIXTURE.make(SEED, i).document for i in range(DOCUMENTS)}
    assert len(demo) == 8
    assert not demo & trained
