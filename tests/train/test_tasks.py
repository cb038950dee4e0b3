"""The task of records, and the demo made of it."""

import collections
import json
import re
from pathlib import Path

import pytest

from kvjax.train.tasks import Difficulty, exact_match, make_example
from kvjax.train.tasks.demo import DIFFICULTY, SEED, main, make_requests
from kvjax.train.tasks.records import ADJECTIVES, NOUNS

DEMOS = Path(__file__).parents[2] / "demos"
HARD = Difficulty(min_records=8, max_records=24, questions=8)
EASY = Difficulty(min_records=2, max_records=4, questions=4, shared_words=False)
EXAMPLES = [make_example(5, index, HARD) for index in range(50)]


def read_document(text):
    """What a reader finds: the value of each (attribute, adjective, noun)."""
    found = re.findall(r"The (\w+) of the (\w+) (\w+) is (\d{4})\.", text)
    assert len({key[:3] for key in found}) == len(found)
    return {key[:3]: key[3] for key in found}


def asked_key(question):
    return re.fullmatch(r"What is the (\w+) of the (\w+) (\w+)\?", question).groups()


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_reader_of_the_document_finds_every_answer(example):
    facts = read_document(example.document)
    system, *turns = example.messages()
    assert system == {"role": "system", "content": example.document}
    assert len(turns) == 16
    for user, assistant in zip(turns[::2], turns[1::2], strict=True):
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert exact_match(assistant["content"], facts[asked_key(user["content"])])


@pytest.mark.parametrize("example", EXAMPLES)
def test_other_records_share_the_words_of_a_key(example):
    keys = list(read_document(example.document))
    for place in range(3):
        uses = collections.Counter(key[place] for key in keys)
        alone = sum(uses[key[place]] == 1 for key in keys)
        # A word may stand alone by chance; few do.
        assert alone <= 0.35 * len(keys)
    # Two words of a key do not find its record either.
    for left_out in range(3):
        pairs = collections.Counter(key[:left_out] + key[left_out + 1 :] for key in keys)
        assert max(pairs.values()) > 1


def test_easy_keys_share_no_word():
    for index in range(50):
        keys = read_document(make_example(5, index, EASY).document)
        assert len({a for _, a, _ in keys}) == len({n for _, _, n in keys}) == len(keys)


def test_sizes_span_the_difficulty():
    assert {len(make_example(5, i, HARD).records) for i in range(400)} == set(range(8, 25))
    assert {len(make_example(5, i, EASY).asked) for i in range(50)} == {2, 3, 4}


def test_examples_are_functions_of_seed_and_index():
    assert make_example(5, 7, HARD) == EXAMPLES[7]
    documents = {make_example(seed, i, HARD).document for seed in (5, 6) for i in range(50)}
    assert len(documents) == 100


def test_no_word_has_two_parts_to_play():
    assert not set(ADJECTIVES) & set(NOUNS)
    assert len({*ADJECTIVES, *NOUNS}) == len(ADJECTIVES) + len(NOUNS)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("4719", True), (" 4719\n", True), ("47190", False), ("4719.", False), ("", False)],
)
def test_scoring(answer, right):
    assert exact_match(answer, "4719") is right


def test_difficulty_refuses_what_no_document_has():
    with pytest.raises(ValueError, match="1 to 16 records"):
        Difficulty(min_records=2, max_records=17, shared_words=False)


def test_requests_interleave_the_documents():
    requests, answers = make_requests(1, 3, DIFFICULTY)
    names = [request["custom_id"] for request in requests]
    assert names[:4] == ["doc0-q0", "doc1-q0", "doc2-q0", "doc0-q1"]
    assert names == [answer["custom_id"] for answer in answers]
    assert len(set(names)) == 3 * 8
    for request, answer in zip(requests, answers, strict=True):
        system, user = request["body"]["messages"]
        facts = read_document(system["content"])
        assert facts[asked_key(user["content"])] == answer["answer"]


@pytest.mark.parametrize("name", ["requests.jsonl", "expected.jsonl"])
def test_the_demo_is_what_the_command_writes(name, tmp_path):
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / name).read_bytes() == (DEMOS / name).read_bytes()
    lines = (DEMOS / name).read_text().splitlines()
    assert len({json.loads(line)["custom_id"] for line in lines}) == 64


def test_the_demo_has_documents_of_its_own():
    trained = {make_example(0, i, DIFFICULTY).document for i in range(8)}
    demo = {make_example(SEED, i, DIFFICULTY).document for i in range(8)}
    assert len(demo) == 8
    assert not demo & trained
