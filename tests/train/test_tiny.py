"""The built-in model `tiny`: what its card says, and that its files fit together."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax.models
from kvjax.models.attention import causal_attend
from kvjax.models.hf import load
from kvjax.models.tokenizer import Tokenizer
from kvjax.train.chat import train_tokenizer
from kvjax.train.lm_config import read_config
from kvjax.train.tasks import Mixture
from kvjax.train.tasks.evaluate import Options, evaluate

pytestmark = pytest.mark.slow

FOLDER = Path(kvjax.models.__file__).parent / "tiny"
DEMOS = Path(__file__).parents[2] / "demos"
NEW_TOKENS = 5


@pytest.fixture(scope="module")
def model():
    return load(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(FOLDER)


def greedy(model, prompts):
    """The likeliest next tokens, one after another: int32[B, NEW_TOKENS]."""
    graph, params, _ = model

    @jax.jit
    def following(params, tokens, length):
        decoder = nnx.merge(graph, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, _ = decoder(tokens, positions, (), causal_attend())
        last = jnp.take_along_axis(hidden, length[:, None, None] - 1, axis=1)[:, 0]
        return jnp.argmax(decoder.logits(last), axis=-1).astype(jnp.int32)

    length = np.asarray([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), length.max() + NEW_TOKENS), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    for step in range(NEW_TOKENS):
        found = np.asarray(following(params, tokens, length + step))
        tokens[np.arange(len(prompts)), length + step] = found
    return tokens[np.arange(len(prompts))[:, None], length[:, None] + np.arange(NEW_TOKENS)]


def lines(name):
    return [json.loads(line) for line in (DEMOS / name).read_text().splitlines()]


def test_it_answers_the_demo(model, tokenizer):
    requests, expected = lines("requests.jsonl"), lines("expected.jsonl")
    prompts = [tokenizer.encode_chat(request["body"]["messages"]) for request in requests]
    right = 0
    for first in range(0, 64, 16):  # 16 at a time: the whole squares of scores are in memory
        for ids, row in zip(
            greedy(model, prompts[first : first + 16]), expected[first : first + 16], strict=True
        ):
            right += tokenizer.decode(ids, skip_special=False) == row["answer"] + "<|eos|>"
    assert right >= 62  # of 64; rounding differs between machines


def test_it_answers_fresh_questions_of_every_task():
    """The card's figures are those of 1000 prompts each; these few must not contradict them."""
    options = Options(model=FOLDER, lengths=(512,), prompts=16, seed=4_000_000)
    shares = evaluate(options)["exact_match"]["512"]
    assert min(share for task, share in shares.items() if task != "counting") >= 14 / 16
    assert shares["counting"] >= 12 / 16


def test_its_files_are_those_of_its_config(model, tokenizer):
    config = read_config("lm_tiny")
    assert dataclasses.replace(model[2], dtype=config.model.dtype) == config.model
    made = train_tokenizer(Mixture.corpus(), config.model.vocab_size)
    assert made.backend.get_vocab() == tokenizer.backend.get_vocab()
    assert made.chat_template == tokenizer.chat_template
    eos = tokenizer.backend.token_to_id("<|eos|>")
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert generation["eos_token_id"] == eos
    assert tokenizer.eos_ids == (eos,)


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 12_000_000
