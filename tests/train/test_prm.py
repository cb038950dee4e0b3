"""Training a policy to judge its own plays: what it sees, what it is told, how it is measured."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import models_for_tests
import numpy as np
import pytest
from flax import nnx

from kvjax.errors import InputError
from kvjax.models import DecoderConfig, causal_attend, hf
from kvjax.models.reward import TokenReward, read_reward
from kvjax.train import prm
from kvjax.train.chat import save_tokenizer, train_tokenizer
from kvjax.train.lm_config import Machine
from kvjax.train.prm_config import PRMConfig, read_config
from kvjax.train.prm_data import asked_places, outcomes, sample_problems
from kvjax.train.prm_gates import auc_within, gates, judge_quality
from kvjax.train.rollouts import make_sampler
from kvjax.train.step import StepOptions
from kvjax.train.tasks import Mixture

pytestmark = pytest.mark.slow

MODEL = DecoderConfig(
    vocab_size=262, num_layers=2, embed_dim=32, mlp_dim=48, num_heads=2, num_kv_heads=1,
    head_dim=16, max_positions=160, tie_embeddings=True, qk_norm=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Mixture.corpus(), MODEL.vocab_size)


def decoder_of(config=MODEL, seed=0):
    graph, params = models_for_tests.random_decoder(config, seed)
    return graph, params, nnx.merge(graph, params)


def test_a_question_sees_the_play_up_to_its_step_and_nothing_sees_the_question():
    _, _, decoder = decoder_of()
    rng = np.random.default_rng(0)
    play = rng.integers(0, 262, (2, 20)).astype(np.int32)
    asked = np.array([[3, 9, 15], [0, 19, 7]], np.int32)
    tokens = np.concatenate([play, np.full((2, 3), 40, np.int32)], axis=1)
    hidden = prm.ask(decoder, jnp.asarray(tokens), jnp.asarray(asked))
    for row in range(2):
        plain = causal(decoder, play[row])
        np.testing.assert_allclose(hidden[row, :20], plain, atol=2e-5)
        for s, place in enumerate(asked[row]):
            alone = causal(decoder, np.append(play[row, : place + 1], 40))[-1]
            # The same sums of float32 in another order.
            np.testing.assert_allclose(hidden[row, 20 + s], alone, atol=2e-5)


def causal(decoder, tokens):
    padded = jnp.zeros((1, 24), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens, jnp.int32))
    positions = jnp.arange(24, dtype=jnp.int32)[None]
    return np.asarray(decoder(padded, positions, (), causal_attend())[0][0])[: len(tokens)]


def test_drawn_plays_follow_the_model(tokenizer):
    """Greedy, by a temperature next to 0: each token is the likeliest after those before."""
    graph, params, decoder = decoder_of()
    prompts = np.zeros((3, 16), np.int32)
    lengths = np.array([1, 4, 7], np.int32)
    rng = np.random.default_rng(1)
    for row, length in enumerate(lengths):
        prompts[row, :length] = rng.integers(0, 262, length)
    sampler = make_sampler(graph, end=261, pad=0, temperature=1e-6)
    tokens = np.asarray(sampler(params, jax.random.key(0), prompts, lengths))
    for row, length in enumerate(lengths):
        assert (tokens[row, :length] == prompts[row, :length]).all()
        likeliest = np.argmax(np.asarray(decoder.logits(causal(decoder, tokens[row]))), axis=-1)
        end = np.flatnonzero(tokens[row] == 261)
        last = int(end[0]) if end.size else 15
        assert (tokens[row, length : last + 1] == likeliest[length - 1 : last]).all()
        assert (tokens[row, last + 1 :] == 0).all()


def test_plays_are_a_pure_function_of_their_numbers_and_judged_by_their_text(tokenizer):
    graph, params, _ = decoder_of()
    sampler = make_sampler(graph, tokenizer.eos_ids[0], 0)
    a = sample_problems(sampler, params, tokenizer, 5, 0, 4, 2, 64)
    b = sample_problems(sampler, params, tokenizer, 5, 0, 4, 2, 64)
    assert (a[0] == b[0]).all()
    assert not a[1].any()  # a random model solves nothing
    example = Mixture(tasks=("countdown",)).make(0, 0)
    from kvjax.models.countdown.game import read_problem

    chat = example.messages()
    prompt = tokenizer.encode_chat(chat[:1])
    play = tokenizer.encode(chat[1]["content"], add_special=False)
    row = np.zeros((2, 128), np.int32)
    row[:, : len(prompt) + len(play)] = [*prompt, *play]
    row[0, len(prompt) + len(play)] = tokenizer.eos_ids[0]
    problems = [read_problem(chat[0]["content"])] * 2
    lengths = np.full(2, len(prompt), np.int32)
    assert outcomes(row, problems, lengths, tokenizer).tolist() == [True, False]  # one never ends
    places, there = asked_places(row, tokenizer, 12)
    assert there.all()
    ends = tokenizer.decode(row[0][places[0]].tolist())
    assert ends == "=:;" * 4


def test_the_area_under_the_curve_is_within_problems():
    right = np.array([[True, False, False], [True, True, False]])
    # Better than chance within the first problem, worse in the second; whatever lies between them.
    chances = np.array([[0.3, 0.1, 0.2], [0.5, 0.7, 0.6]])
    assert auc_within(chances, right) == pytest.approx(3 / 4)
    assert auc_within(np.full((2, 3), 0.5), right) == 0.5
    assert auc_within(chances[:1], right[:1] & False) is None
    chances[0, 0] = np.nan
    assert auc_within(chances, right) == pytest.approx(1 / 2)


def test_gates_hold_for_a_good_judge_and_fail_for_a_blind_one():
    rng = np.random.default_rng(0)
    chance = rng.beta(1, 5, 4000)
    right = rng.random(4000) < chance
    ends = np.stack([chance] * 3 + [np.where(right, 0.95, 0.05)] * 9, axis=1)
    there = np.ones(ends.shape, bool)
    good = judge_quality(ends, there, right, 8)
    good["mean_chance"] = good["mean_outcome"]
    assert good["brier"][11] < good["brier"][0]
    blind = judge_quality(np.full(ends.shape, 0.4), there, right, 8)
    assert gates(blind)["calibrated within a point"] is False
    assert gates(blind)["last steps told apart (.9)"] is False
    assert all(gates(good).values()), good
    assert blind["auc_within_problem"][0] == 0.5


def tiny_config(policy):
    return dataclasses.replace(
        read_config("prm_countdown"), policy=str(policy), rounds=2, rollouts=16, rollout_rows=8,
        steps=4, batch_size=8, model_plays=4, machine=Machine(), eval_problems=4, eval_rollouts=2,
        step=StepOptions(clip_norm=1.0), save_every=2, log_every=2,
    )  # fmt: skip


def test_a_run_resumes_and_writes_a_model_that_judges(tmp_path, tokenizer):
    _, params, _ = decoder_of()
    policy = tmp_path / "policy"
    hf.save(policy, MODEL, params, dtype="float32")
    save_tokenizer(policy, tokenizer, max_positions=160)
    config = tiny_config(policy)
    whole = prm.train(config, tmp_path / "whole")
    assert whole["gates"]["success from 8 to 40 %"] is False
    head = read_reward(tmp_path / "whole" / "model")
    assert head == TokenReward(
        ask=(tokenizer.backend.token_to_id("?"),),
        good=tokenizer.backend.token_to_id("y"),
        bad=tokenizer.backend.token_to_id("n"),
    )
    # Interrupted: one round is whole, of the other one part of the plays is there.
    prm.train(dataclasses.replace(config, rounds=1), tmp_path / "broken")
    run = json.loads((tmp_path / "broken" / "run.json").read_text())
    (tmp_path / "broken" / "run.json").write_text(json.dumps(run | {"rounds": 2}))
    prm.train(config, tmp_path / "broken")
    for name in ("round_0", "round_1"):
        a, b = (
            hf.load(tmp_path / run / name / "model")[1] for run in ("whole", "broken")
        )  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, a, b)
    with pytest.raises(InputError, match="other settings"):
        prm.train(dataclasses.replace(config, seed=11), tmp_path / "whole")


def test_settings_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(InputError, match="multiple"):
        PRMConfig(policy="x", rollouts=10, rollout_rows=4)
    with pytest.raises(InputError, match="different letters"):
        PRMConfig(policy="x", ask="y")
    with pytest.raises(InputError, match="no config"):
        read_config("lm_tiny")
    with pytest.raises(InputError, match="no reward"):
        read_reward(tmp_path)
