"""The tokenizer and the form of a chat."""

import json

import pytest

from kvjax.models.tokenizer import Tokenizer
from kvjax.train.chat import save_tokenizer, train_tokenizer
from kvjax.train.tasks.words import ADJECTIVES, ATTRIBUTES, NOUNS, corpus

CHAT = [
    {"role": "system", "content": "It rained."},
    {"role": "user", "content": "Did it?"},
    {"role": "assistant", "content": "Yes"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus(), 640)


@pytest.mark.parametrize(
    "text", ["The code is 4719.", "a\n\n b\t", "naïve 世界 🦊", "\x00\x7f", " lead, trail ", ""]
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_tokens_of_their_own(tokenizer):
    ids = tokenizer.encode("4719")
    assert [tokenizer.decode([i]) for i in ids] == list("4719")
    assert tokenizer.encode(" is 4719.")[-5:-1] == ids


def test_words_of_the_task_are_single_tokens(tokenizer):
    words = [*ADJECTIVES, *NOUNS, *ATTRIBUTES, "The"]
    assert [word for word in words if len(tokenizer.encode(f" {word}")) > 1] == []


def test_chat_form(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=False)
    assert text == ("<|bos|><|system|>\nIt rained.<|user|>\nDid it?<|assistant|>\nYes<|eos|>")
    prompt = tokenizer.apply_chat_template(CHAT[:2])
    assert prompt == "<|bos|><|system|>\nIt rained.<|user|>\nDid it?<|assistant|>\n"


def test_marks_are_single_tokens(tokenizer):
    marks = ["<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|eos|>", "<|pad|>"]
    assert [len(tokenizer.encode(mark)) for mark in marks] == [1] * len(marks)


def test_written_files_give_the_same_tokenizer(tokenizer, tmp_path):
    save_tokenizer(tmp_path, tokenizer, max_positions=64)
    read = Tokenizer.load(tmp_path)
    assert read.encode_chat(CHAT) == tokenizer.encode_chat(CHAT)
    assert (read.eos_ids, read.bos_id) == (tokenizer.eos_ids, tokenizer.bos_id)
    assert read.special_tokens == tokenizer.special_tokens
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 64
