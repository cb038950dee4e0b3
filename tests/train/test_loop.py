"""The shared loop: a killed run goes on as if nothing had happened."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvjax.train.loop import init_state, make_step, run

STEPS = 7


def batches(step):
    return np.random.default_rng((3, step)).normal(size=4).astype(np.float32)


def loss(params, batch):
    error = params["w"] - batch
    return jnp.mean(error * error), {"largest": jnp.max(jnp.abs(error))}


def train(folder, batches=batches, steps=STEPS):
    optimizer = optax.adam(0.1)
    state = init_state({"w": jnp.arange(4, dtype=jnp.float32)}, optimizer)
    step = make_step(loss, optimizer)
    return run(step, state, batches, steps=steps, folder=folder, save_every=2, log_every=3)


def killed_at(step):
    def batches_until(number):
        if number == step:
            raise KeyboardInterrupt
        return batches(number)

    return batches_until


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_killed_run_ends_bit_equal(tmp_path, step):
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", killed_at(step))
    seen = []
    resumed = train(tmp_path / "killed", lambda number: seen.append(number) or batches(number))
    assert seen == list(range(step // 2 * 2, STEPS))  # from the last checkpoint on, no earlier
    chex.assert_trees_all_equal(whole, resumed)


def test_metrics_are_the_means_since_the_last_line(tmp_path):
    state = init_state({"w": jnp.arange(4, dtype=jnp.float32)}, optax.sgd(0.0))
    step = make_step(loss, optax.sgd(0.0))
    run(step, state, batches, steps=STEPS, folder=tmp_path, save_every=2, log_every=3)
    errors = [np.arange(4) - batches(number) for number in range(STEPS)]
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [3, 6, 7]
    # float32 arithmetic on four numbers of size one.
    for row, part in zip(found, (errors[:3], errors[3:6], errors[6:]), strict=True):
        np.testing.assert_allclose(row["loss"], np.mean(np.square(part)), rtol=1e-5)
        np.testing.assert_allclose(row["largest"], np.abs(part).max(-1).mean(), rtol=1e-5)


def test_a_resumed_run_writes_each_line_of_metrics_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, killed_at(6))  # line 3 is written, the checkpoint is at 6
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1}\n{"step": 1')  # of steps undone, and cut short
    train(tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [3, 6, 7]


def test_a_finished_run_takes_no_more_steps(tmp_path):
    first = train(tmp_path)
    second = train(tmp_path, killed_at(STEPS))
    for a, b in zip(leaves(first), leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_state_is_donated():
    optimizer = optax.adam(0.1)
    step = make_step(loss, optimizer)
    state = init_state({"w": jnp.arange(4, dtype=jnp.float32)}, optimizer)
    step(state, batches(0))
    assert state.params["w"].is_deleted()


def test_nothing_is_printed_where_nobody_watches(tmp_path, capsys):
    train(tmp_path)
    assert capsys.readouterr() == ("", "")
