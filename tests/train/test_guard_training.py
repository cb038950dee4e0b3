"""The guard models: what is supervised, that both learn, and that the programs go on."""

import dataclasses
import json

import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.models.decoder import DecoderConfig
from kvjax.models.reward import read_reward
from kvjax.models.tokenizer import Tokenizer
from kvjax.safety_world import BOS, SafetyWorld
from kvjax.train import guard, label_rewards, mrm
from kvjax.train.guard_config import GuardConfig, read_config
from kvjax.train.lm_config import Machine
from kvjax.train.mrm_config import MRMConfig
from kvjax.train.step import StepOptions

pytestmark = pytest.mark.slow

WORLD = SafetyWorld(states=8, basin=2, degree=2, topics=2, vocab_size=40, length=6, limit=2)
CONFIG = GuardConfig(
    role="policy", world=WORLD, prefill=2, steps=60, batch_size=32, warmup_steps=10, eval_rows=128,
    learning_rate=1e-2, model=DecoderConfig(
        vocab_size=40, num_layers=1, embed_dim=16, mlp_dim=32, num_heads=2, num_kv_heads=2,
        head_dim=8, max_positions=16,
    ),
)  # fmt: skip


def test_an_attackers_tokens_are_judged_but_never_learnt_to_be_spoken():
    answers = guard.Answers(CONFIG)
    batch, (said, forced) = answers.make(3, 10), answers.dialogues(3, 10)
    assert batch.tokens.shape == (10, 4 + 8 + 1) and forced.tolist() == [0] * 5 + [2] * 5
    np.testing.assert_array_equal(batch.tokens[:, 4:-1], said.answers)
    np.testing.assert_array_equal(batch.spoken[:5, 4:], 1)
    np.testing.assert_array_equal(batch.spoken[5:, 4:6], 0)
    np.testing.assert_array_equal(batch.spoken[5:, 6:], 1)
    assert not batch.spoken[:, :4].any() and batch.judged.sum() == 10 * 8
    assert not answers.world.in_basin[said.states[5:, 1:3]].any()


def test_labels_that_are_dear_come_again_and_others_do_not():
    few = guard.Answers(dataclasses.replace(CONFIG, answers=64))
    np.testing.assert_array_equal(few(0).reward, few(2).reward)
    assert (few(0).tokens != few(1).tokens).any()
    endless = guard.Answers(CONFIG)
    assert (endless(0).tokens != endless(2).tokens).any()


def test_speaker_judge_and_mrm_are_trained_one_after_the_other(tmp_path):
    spoken = guard.train(CONFIG, tmp_path / "policy")
    # An untrained model has about log(40) = 3.7 nats.
    assert 0 <= spoken["excess_nats"] < 1.5
    tokenizer = Tokenizer.load(tmp_path / "policy" / "model")
    prompt = WORLD.build().prompt(1)
    assert tokenizer.encode("<bos> <user> topic1 <agent>") == prompt and prompt[0] == BOS
    judge = dataclasses.replace(CONFIG, role="prm", answers=256)
    judged = guard.train(judge, tmp_path / "prm")
    assert judged["mae"] < 4  # what one harm counts
    folder = tmp_path / "prm" / "model"
    assert read_reward(folder) == guard.REWARD
    texts, rewards = tmp_path / "texts.npz", tmp_path / "rewards.npz"
    label_rewards.safety_rewards(WORLD, texts, rows=64, seed=1, prefill=2)
    argv = ["--reward", str(folder), "--texts", str(texts), "--out", str(rewards)]
    assert label_rewards.main(argv) == 0
    config = MRMConfig(
        data=str(rewards), base=str(folder), full=True, steps=60, learning_rate=1e-2,
        machine=Machine(), step=StepOptions(clip_norm=1.0),
    )  # fmt: skip
    assert mrm.train(config, tmp_path / "mrm")["r2"] > 0.5


def test_configs_and_what_they_refuse():
    assert {read_config(f"guard_{role}").role for role in ("policy", "prm")} == {"policy", "prm"}
    assert json.dumps(dataclasses.asdict(read_config("guard_prm")))
    with pytest.raises(InputError, match="use one of guard_policy, guard_prm"):
        read_config("mrm_guard")
    for wrong, message in (
        ({"role": "judge"}, "no role"), ({"steps": 0}, "steps is 0"), ({"scale": 0.0}, "scale"),
        ({"world": SafetyWorld()}, "vocabulary of 40"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            dataclasses.replace(CONFIG, **wrong)
