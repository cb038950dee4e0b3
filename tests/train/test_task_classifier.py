"""The task classifier: what it sees, what it learns, and the one that ships with `tiny`."""

from pathlib import Path

import numpy as np
import pytest

import kvjax.models
from kvjax.errors import InputError
from kvjax.models.task_classifier import ends, load_classifier
from kvjax.models.tokenizer import Tokenizer
from kvjax.train.task_classifier import Options, accuracy, make_data, train
from kvjax.train.tasks import TASKS

TINY = Path(kvjax.models.__file__).parent / "tiny"
OPTIONS = Options(model=TINY, out=Path("unused"), prompts=4, lengths=(256,), steps=60)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(TINY)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 20])
def test_ends_are_the_first_and_the_last_tokens(length):
    tokens = np.arange(1, length + 1, dtype=np.int32)
    filled, used = ends(tokens, 4)
    expected = tokens if length <= 8 else np.concatenate([tokens[:4], tokens[-4:]])
    assert filled[used].tolist() == expected.tolist()


def test_it_learns_to_tell_them_apart(tokenizer):
    model = train(tokenizer, tuple(TASKS), OPTIONS)
    assert accuracy(model, tokenizer, tuple(TASKS), OPTIONS) > 0.95


def test_the_one_that_ships_tells_fresh_prompts(tokenizer):
    model = load_classifier(TINY / "task_classifier.safetensors")
    assert accuracy(model, tokenizer, tuple(TASKS), OPTIONS) == 1.0
    tokens, used, classes = make_data(tokenizer, ("counting", "passkey"), OPTIONS, 9)
    assert [model.classify(row[use]) for row, use in zip(tokens, used, strict=True)] == (
        classes.tolist()
    )


def test_another_file_is_refused():
    with pytest.raises(InputError, match="embed"):
        load_classifier(TINY / "model.safetensors")
