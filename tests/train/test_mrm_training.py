"""Training MRMs: which entries are supervised, both schemes, the data's file, the programs."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import models_for_tests
import numpy as np
import optax
import pytest
from flax import nnx

from kvjax.errors import InputError
from kvjax.models import causal_attend, hf
from kvjax.models.lora import LoRA
from kvjax.models.mrm import HEADS, MRM, load_mrm
from kvjax.models.reward import TokenReward, save_reward
from kvjax.safety_world import SafetyWorld
from kvjax.train import label_rewards, mrm
from kvjax.train.mrm_config import MRMConfig, read_config
from kvjax.train.reward_data import RewardBatch, RewardFile, make_batches, write_rewards
from kvjax.train.step import init_state, make_step

pytestmark = pytest.mark.slow

CONFIG = dataclasses.replace(
    models_for_tests.CONFIG, vocab_size=40, num_layers=2, embed_dim=24, mlp_dim=32, head_dim=8,
    windows=(), qkv_bias=False, max_positions=16,
)  # fmt: skip
GRAPH, BASE = models_for_tests.random_decoder(CONFIG)
SEEN = np.arange(40) < 20


def random_rows(path, rows=6, length=9, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 20, (rows, length))
    mask = np.arange(length)[None] < rng.integers(3, length + 1, (rows, 1))
    write_rewards(
        path, tokens, np.full(rows, 2), mask, rng.normal(0, 3, (rows, length)), vocab_size=40
    )
    return RewardFile(path)


def model(head="paper", scale=0.1):
    made = MRM(GRAPH, CONFIG, head, LoRA())
    params, rng = made.init(BASE, 0), np.random.default_rng(1)
    draw = lambda x: jnp.asarray(rng.normal(0, scale, x.shape), jnp.float32)  # noqa: E731
    return made, {
        name: x if name == "base" else jax.tree.map(draw, x) for name, x in params.items()
    }


def batch_of(file, rows=None):
    tokens, reward, mask, _ = zip(*(file[i] for i in rows or range(len(file))), strict=True)
    weights = np.stack(mask).astype(np.float32)
    return RewardBatch(np.stack(tokens), np.stack(reward), weights, np.stack(tokens) + 20)


def test_each_token_supervises_one_entry_of_one_vector(tmp_path):
    """dL/dM is 2 (M - R) at the token that followed and 0.0 at all others."""
    file = random_rows(tmp_path / "a.npz")
    made, params = model()
    batch = batch_of(file)
    loss = mrm.mrm_loss(made, SEEN)
    decoder = made.decoder(params)
    positions = jnp.arange(8, dtype=jnp.int32)[None]
    inputs = jnp.asarray(batch.tokens[:, :-1])
    hidden = decoder(inputs, jnp.broadcast_to(positions, inputs.shape), (), causal_attend())[0]
    found = np.asarray(made.rewards(decoder, params["head"], hidden))
    own = np.take_along_axis(found, batch.tokens[:, 1:, None], axis=2)[..., 0]
    error = (own - batch.reward[:, 1:]) * batch.weights[:, 1:]
    grads, sums = jax.jit(jax.grad(lambda p: (loss(p, batch).loss, loss(p, batch)), has_aux=True))(
        params
    )
    np.testing.assert_allclose(sums.loss, np.sum(error**2), rtol=1e-5)
    assert float(sums.weight) == batch.weights[:, 1:].sum()
    bias = np.zeros(40)
    np.add.at(bias, batch.tokens[:, 1:], 2 * error)
    np.testing.assert_allclose(grads["head"]["bias"], bias, atol=1e-3)  # float32 sums of tens
    # Exactly nothing for tokens that never follow, nor for the decoder itself.
    assert not np.asarray(grads["head"]["bias"])[20:].any()
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(grads["base"]))
    assert all(np.asarray(x).any() for x in jax.tree.leaves(grads["lora"]))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_bias_of_a_token_never_seen_stays_to_the_bit(tmp_path, decay):
    file = random_rows(tmp_path / "a.npz")
    made, params = model()
    config = MRMConfig(data="x", base="y", learning_rate=0.01, weight_decay=decay)
    optimizer = mrm.make_optimizer(config)
    state = init_state(params, optimizer)
    step = make_step(mrm.mrm_loss(made, SEEN), optimizer)
    for _ in range(3):
        state, _ = step(state, batch_of(file))
    before, after = (np.asarray(p["head"]["bias"]) for p in (params, state.params))
    np.testing.assert_array_equal(after[20:], before[20:])
    assert (after[:20] != before[:20]).any()
    jax.tree.map(np.testing.assert_array_equal, state.params["base"], params["base"])


@pytest.mark.parametrize("head", ["paper", "marginal"])
def test_both_schemes_have_the_same_mean_gradient(tmp_path, head):
    """All prefixes one by one, and each text in one pass: the same terms, the same gradient."""
    file = random_rows(tmp_path / "a.npz")
    made, params = model(head)
    loss = jax.jit(jax.grad(lambda p, batch: mrm.mrm_loss(made, SEEN)(p, batch).loss))
    count = int(file.arrays["mask"].sum())
    prefixes = make_batches(file, size=count, seed=3, scheme="prefix")(0)
    assert (prefixes.weights.sum(axis=1) == 1).all()
    texts = make_batches(file, size=6, seed=3)(0)
    assert texts.weights.sum() == count
    a, b = loss(params, texts), loss(params, prefixes)
    # Sums of float32 in another order.
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-3)  # noqa: E731
    jax.tree.map(close, a, b)


def test_max_consistency_learns_the_best_that_follows(tmp_path):
    file = random_rows(tmp_path / "a.npz", rows=1)
    made, params = model("max-consistency")
    batch = batch_of(file)
    last = int(batch.weights[0].nonzero()[0][-1])
    decoder = made.decoder(params)
    positions = jnp.arange(9, dtype=jnp.int32)[None]
    hidden = decoder(jnp.asarray(batch.tokens), positions, (), causal_attend())[0]
    found = np.asarray(made.rewards(decoder, params["head"], hidden))[0]
    total = 0.0
    for j in range(1, last + 1):
        target = batch.reward[0, j] if j == last else found[j, :20].max()
        total += (found[j - 1, batch.tokens[0, j]] - target) ** 2
    assert float(mrm.mrm_loss(made, SEEN)(params, batch).loss) == pytest.approx(total, rel=1e-4)


def test_the_pull_is_the_squared_marginal_of_the_drawn_tokens(tmp_path):
    file = random_rows(tmp_path / "a.npz")
    made, params = model("marginal")
    batch = batch_of(file)
    plain, pulled = (float(mrm.mrm_loss(made, SEEN, pull=x)(params, batch).loss) for x in (0, 2.0))
    decoder = made.decoder(params)
    inputs = jnp.asarray(batch.tokens[:, :-1])
    positions = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32)[None], inputs.shape)
    hidden = decoder(inputs, positions, (), causal_attend())[0]
    drawn = jnp.asarray(batch.drawn[:, 1:])
    marginal = made.marginal_of(decoder, params["head"], hidden, drawn)
    expected = 2 * np.sum(np.asarray(marginal) ** 2 * batch.weights[:, 1:])
    assert pulled - plain == pytest.approx(expected, rel=1e-3)


def test_batches_are_all_rows_in_random_order_and_travel_to_other_processes(tmp_path):
    file = random_rows(tmp_path / "a.npz")
    batches = make_batches(file, size=3, seed=0)
    there = pickle.loads(pickle.dumps(batches))
    for step in (0, 1, 5):
        jax.tree.map(np.testing.assert_array_equal, batches(step), there(step))
    epochs = [np.concatenate([batches(2 * e).tokens, batches(2 * e + 1).tokens]) for e in (0, 1)]
    for epoch in epochs:
        np.testing.assert_array_equal(
            sorted(map(tuple, epoch)), sorted(map(tuple, file.arrays["tokens"]))
        )
    assert (epochs[0] != epochs[1]).any()
    assert not make_batches(file, size=6, seed=0, answers_only=True)(0).weights[:, :2].any()
    np.testing.assert_array_equal(
        file.arrays["seen"], np.isin(np.arange(40), file.arrays["tokens"][file.arrays["mask"]])
    )


def test_files_that_are_no_rewards_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "b.npz", **random_rows(tmp_path / "a.npz").arrays)
    np.savez(tmp_path / "c.npz", tokens=np.zeros((2, 3), np.int32))
    (tmp_path / "d.npz").write_bytes(b"PK")
    for name in "bcde":
        with pytest.raises(InputError, match=f"{name}.npz: no file of rewards"):
            len(RewardFile(tmp_path / f"{name}.npz"))


@pytest.mark.parametrize("ask", [(), (7,), (7, 8, 9)])
def test_labels_are_what_the_judge_says_of_each_beginning_alone(ask):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (3, 6)).astype(np.int32)
    mask = rng.random((3, 6)) < 0.7
    reward = TokenReward(good=3, bad=4, ask=ask)
    found = label_rewards.label(GRAPH, BASE, reward, tokens, mask, rows=4)
    decoder = nnx.merge(GRAPH, BASE)
    assert not found[~mask].any()
    for row, place in zip(*np.nonzero(mask), strict=True):
        text = jnp.asarray([*tokens[row, : place + 1], *ask], jnp.int32)[None]
        positions = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
        logits = decoder.logits(decoder(text, positions, (), causal_attend())[0][:, -1])[0]
        # float32, in passes of other shapes.
        assert found[row, place] == pytest.approx(float(logits[3] - logits[4]), abs=1e-4)


def test_the_program_labels_texts_by_a_model(tmp_path):
    hf.save(tmp_path / "judge", CONFIG, BASE, dtype="float32")
    save_reward(tmp_path / "judge", TokenReward(good=3, bad=4))
    tokens = np.random.default_rng(0).integers(0, 40, (3, 6))
    mask = np.ones((3, 6), bool)
    np.savez(tmp_path / "t.npz", tokens=tokens, prompt_len=np.full(3, 2), mask=mask)
    out = tmp_path / "r.npz"
    words = ["--reward", str(tmp_path / "judge"), "--texts", str(tmp_path / "t.npz")]
    assert label_rewards.main([*words, "--out", str(out), "--json"]) == 0
    file = RewardFile(out)
    np.testing.assert_array_equal(file.arrays["tokens"], tokens)
    assert not file.arrays["mask"][:, 0].any()
    with pytest.raises(InputError, match="together"):
        label_rewards.main([*words[:2], "--out", str(out)])
    np.savez(tmp_path / "t.npz", tokens=tokens + 30, prompt_len=np.full(3, 2), mask=mask)
    with pytest.raises(InputError, match="vocabulary of 40"):
        label_rewards.main([*words, "--out", str(out)])


def world_file(path, rows=60):
    world = SafetyWorld(states=9, basin=2, degree=3, topics=2, vocab_size=40, length=6)
    label_rewards.safety_rewards(world, path, rows=rows, seed=1, prefill=2)
    return RewardFile(path)


def test_a_world_rates_its_own_answers(tmp_path):
    file = world_file(tmp_path / "w.npz")
    assert file.arrays["tokens"].shape == (60, 4 + 8 + 1)
    assert file.arrays["mask"].sum() == 60 * 8
    assert 0 < file.arrays["seen"].sum() < 30
    assert file.arrays["reward"].max() > 4


@pytest.mark.parametrize("head", HEADS)
def test_a_run_resumes_and_writes_a_model(tmp_path, head):
    world_file(tmp_path / "w.npz")
    hf.save(tmp_path / "base", CONFIG, BASE, dtype="float32")
    config = MRMConfig(
        data=str(tmp_path / "w.npz"), base=str(tmp_path / "base"), head=head, steps=4,
        batch_size=8, learning_rate=1e-2, save_every=2, log_every=1,
        pull=0.1 if head == "marginal" else 0.0,
    )  # fmt: skip
    whole = mrm.train(config, tmp_path / "whole")
    mrm.train(dataclasses.replace(config, steps=2), tmp_path / "broken")
    run = json.loads((tmp_path / "broken" / "run.json").read_text())
    (tmp_path / "broken" / "run.json").write_text(json.dumps(run | {"steps": 4}))
    resumed = mrm.train(config, tmp_path / "broken")
    assert resumed["mae"] == whole["mae"]
    a, b = (load_mrm(tmp_path / run / "model") for run in ("whole", "broken"))
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])
    np.testing.assert_array_equal(a[2], RewardFile(tmp_path / "w.npz").arrays["seen"])


def test_a_teacher_that_can_be_met_is_met(tmp_path):
    """Rewards that another adapter of the same base gives: the error goes to almost nothing."""
    teacher, truth = model(scale=0.2)
    tokens = np.random.default_rng(0).integers(0, 40, (16, 12)).astype(np.int32)
    decoder = teacher.decoder(truth)
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], tokens.shape)
    hidden = decoder(jnp.asarray(tokens), positions, (), causal_attend())[0]
    found = np.asarray(teacher.rewards(decoder, truth["head"], hidden))
    reward = np.zeros(tokens.shape, np.float32)
    reward[:, 1:] = np.take_along_axis(found[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    batch = RewardBatch(tokens, reward, np.ones(tokens.shape, np.float32), tokens)
    optimizer = optax.partition(
        {"base": optax.set_to_zero(), "lora": optax.adam(1e-2), "head": optax.adam(1e-2)},
        lambda p: {name: jax.tree.map(lambda _: name, x) for name, x in p.items()},  # noqa: B023
    )
    state = init_state(teacher.init(BASE, 5), optimizer)
    step = make_step(mrm.mrm_loss(teacher, SEEN | True), optimizer)
    losses = []
    for _ in range(600):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 0.1
    assert losses[-1] < 1e-3, losses[-1]


def test_settings_that_cannot_be_used_are_refused(tmp_path):
    good = {"data": "x", "base": "y"}
    for wrong in (
        {"steps": 0}, {"head": "vector"}, {"scheme": "tokens"}, {"base": ""}, {"pull": 1.0},
        {"head": "max-consistency", "scheme": "prefix"},
    ):  # fmt: skip
        with pytest.raises(InputError):
            MRMConfig(**{**good, **wrong})
    assert read_config("mrm_tiny").full
    file = random_rows(tmp_path / "a.npz")
    config = dataclasses.replace(read_config("mrm_tiny"), data=str(file.path))
    with pytest.raises(InputError, match="vocabulary of 40"):
        mrm.train(config, tmp_path / "run")
