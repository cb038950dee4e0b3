"""Multifurcation reward models: vectors are many scalars, the bias counts, merging keeps all."""

import dataclasses

import jax
import jax.numpy as jnp
import models_for_tests
import numpy as np
import pytest
from flax import nnx

from kvjax.errors import InputError
from kvjax.models import causal_attend
from kvjax.models.lora import LoRA
from kvjax.models.mrm import HEADS, MRM, conservative, load_mrm, save_mrm

CONFIG = dataclasses.replace(models_for_tests.CONFIG, vocab_size=40, num_layers=2, windows=())
GRAPH, BASE = models_for_tests.random_decoder(CONFIG)


def random_mrm(head, lora=True, seed=0, config=CONFIG):
    graph, base = models_for_tests.random_decoder(config)
    mrm = MRM(graph, config, head, LoRA() if lora else None)
    params, rng = mrm.init(base, seed), np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)  # noqa: E731
    return mrm, {name: x if name == "base" else jax.tree.map(draw, x) for name, x in params.items()}


def hidden_of(decoder, tokens):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return decoder(tokens, positions, (), causal_attend())[0]


TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 40, (1, 7)), jnp.int32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_a_vector_is_many_scalars(head, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    mrm, params = random_mrm(head, config=config)
    decoder = mrm.decoder(params)
    hidden = hidden_of(decoder, TOKENS)
    whole = mrm.rewards(decoder, params["head"], hidden)
    each = [
        mrm.reward_of(decoder, params["head"], hidden, jnp.full((1, 7), a, jnp.int32))
        for a in range(40)
    ]
    # Sums of 48 float32 products in another order.
    np.testing.assert_allclose(whole, np.stack(each, axis=-1), atol=2e-5)


def test_at_first_the_rewards_are_the_bases_logits():
    mrm = MRM(GRAPH, CONFIG, "paper", LoRA())
    params = mrm.init(BASE, 0)
    decoder, base = mrm.decoder(params), nnx.merge(GRAPH, BASE)
    hidden = hidden_of(decoder, TOKENS)
    logits = base.logits(hidden_of(base, TOKENS))
    np.testing.assert_array_equal(mrm.rewards(decoder, params["head"], hidden), logits)


def test_the_bias_is_live():
    mrm, params = random_mrm("paper")
    decoder = mrm.decoder(params)
    hidden = hidden_of(decoder, TOKENS)
    head = {"bias": jnp.zeros(40, jnp.float32)}
    moved = mrm.rewards(decoder, {"bias": head["bias"] + 5.0}, hidden)
    np.testing.assert_array_equal(moved, mrm.rewards(decoder, head, hidden) + 5.0)


def test_a_token_whose_marginal_is_nothing_has_the_baselines_reward():
    mrm, params = random_mrm("marginal")
    head = {**params["head"], "projection": jnp.zeros((48, 48), jnp.float32)}
    decoder = mrm.decoder(params)
    rewards = mrm.rewards(decoder, head, hidden_of(decoder, TOKENS))
    assert np.ptp(rewards, axis=-1).max() == 0
    assert np.ptp(rewards, axis=1).max() > 0


@pytest.mark.parametrize("head", HEADS)
def test_merged_and_written_and_read_again_it_says_the_same(head, tmp_path):
    mrm, params = random_mrm(head)
    decoder = mrm.decoder(params)
    before = mrm.rewards(decoder, params["head"], hidden_of(decoder, TOKENS))
    seen = np.arange(40) % 3 > 0
    save_mrm(tmp_path, mrm, params, seen)
    mrm, params, found = load_mrm(tmp_path)
    assert mrm.lora is None
    assert mrm.head == head
    np.testing.assert_array_equal(found, seen)
    decoder = mrm.decoder(params)
    after = mrm.rewards(decoder, params["head"], hidden_of(decoder, TOKENS))
    np.testing.assert_allclose(after, before, atol=1e-5)  # float32, merged by another program


def test_what_was_never_seen_is_never_best():
    rewards = conservative(jnp.asarray([[3.0, 1.0, 2.0]]), jnp.asarray([False, True, True]))
    np.testing.assert_array_equal(rewards, [[-np.inf, 1.0, 2.0]])


def test_what_is_no_mrm_is_refused(tmp_path):
    with pytest.raises(InputError, match="use one of"):
        MRM(GRAPH, CONFIG, "vector")
    with pytest.raises(InputError, match=r"mrm\.json"):
        load_mrm(tmp_path)
