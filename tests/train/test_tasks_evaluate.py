"""Measuring a model on the tasks: what counts as right, and what the command prints."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.models.attention import causal_attend
from kvjax.models.decoder import Decoder, DecoderConfig
from kvjax.models.hf import save
from kvjax.train.chat import save_tokenizer, train_tokenizer
from kvjax.train.tasks import Mixture
from kvjax.train.tasks.evaluate import _make_right, main

CONFIG = DecoderConfig(
    vocab_size=624, num_layers=1, embed_dim=16, mlp_dim=16, num_heads=2, num_kv_heads=1,
    head_dim=8, max_positions=256, qk_norm=True, tie_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def split():
    return nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))


def likeliest(split, ids):
    """The token that the model itself would write next."""
    decoder = nnx.merge(*split)
    tokens = jnp.asarray(ids, jnp.int32)[None]
    hidden, _ = decoder(tokens, jnp.arange(len(ids))[None], (), causal_attend())
    return int(jnp.argmax(decoder.logits(hidden[0, -1])))


@pytest.mark.slow
def test_an_answer_is_right_if_it_is_what_the_model_writes(split):
    prompt, answer = [5, 9, 2, 300], []
    for _ in range(3):
        answer.append(likeliest(split, prompt + answer))
    tokens = np.zeros((4, 8), np.int32)
    tokens[:, :7] = prompt + answer
    places, weights = np.zeros((4, 5), np.int32), np.zeros((4, 5), bool)
    places[:, :3], weights[:, :3] = [3, 4, 5], True
    for row in range(1, 4):  # one token of each other row's answer is another one
        tokens[row, 3 + row] += 1
    right = _make_right(split[0])(split[1], tokens, places, weights)
    assert right.tolist() == [True, False, False, False]


@pytest.mark.slow
def test_the_command_prints_every_length_and_task(split, tmp_path, capsys):
    save(tmp_path, CONFIG, split[1], dtype="float32")
    tokenizer = train_tokenizer(Mixture.corpus(), CONFIG.vocab_size)
    save_tokenizer(tmp_path, tokenizer, max_positions=CONFIG.max_positions)
    options = ["--lengths", "144", "160", "--prompts", "5", "--rows", "4"]
    assert main([str(tmp_path), *options, "--tasks", "passkey", "counting"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prompts"] == 5
    # Nobody trained it.
    none = {"passkey": 0.0, "counting": 0.0}
    assert result["exact_match"] == {"144": none, "160": none}
