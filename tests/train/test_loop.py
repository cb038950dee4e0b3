"""The shared loop: a killed run goes on as if nothing had happened."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvjax.errors import InputError
from kvjax.train import checkpoints, metrics
from kvjax.train.data import step_dataset
from kvjax.train.loop import run
from kvjax.train.metrics import Work
from kvjax.train.step import StepOptions, Sums, init_state, make_step

STEPS = 7


def batches(step):
    return np.random.default_rng((3, step)).normal(size=(2, 4)).astype(np.float32)


def loss(params, batch):
    error = params["w"][None] - batch
    rows = jnp.float32(batch.shape[0])
    return Sums(jnp.sum(error * error), rows, {"largest": jnp.sum(jnp.max(jnp.abs(error), -1))})


def train(folder, batches=batches, steps=STEPS, learning_rate=0.1, **options):
    optimizer = optax.adam(learning_rate)
    state = init_state({"w": jnp.arange(4, dtype=jnp.float32)}, optimizer, ema=True)
    step = make_step(loss, optimizer, StepOptions(ema_decay=0.5))
    options = {"save_every": 2, "log_every": 3} | options
    return run(step, state, step_dataset(batches, steps), steps=steps, folder=folder, **options)


def killed_at(step):
    """What a run may call after each step; it is interrupted before the given one ends."""
    count = []

    def work(batch):
        count.append(batch)
        if len(count) == step:
            raise KeyboardInterrupt
        return Work(batch.size)

    return work


def rows(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_killed_run_ends_bit_equal(tmp_path, step):
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", work=killed_at(step))
    seen = []
    resumed = train(
        tmp_path / "killed", lambda n: seen.append(n) or batches(n), work=lambda x: Work(x.size)
    )
    assert sorted(seen) == list(range((step - 1) // 2 * 2, STEPS))  # no earlier than its checkpoint
    chex.assert_trees_all_equal(whole, resumed)
    name = "metrics.jsonl"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


PROGRAM = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_loop import Work, train

    left = int(sys.argv[2])

    def work(batch):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return Work(batch.size)

    train(Path(sys.argv[1]), steps=60, work=work, save_every=7, log_every=4)
"""


@pytest.mark.slow
def test_kill_minus_9_changes_nothing(tmp_path):
    """Killed by the system at random steps, often while a checkpoint is being written."""
    whole = train(tmp_path / "whole", steps=60, save_every=7, log_every=4)
    program = textwrap.dedent(PROGRAM.format(tests=os.path.dirname(__file__)))  # noqa: PTH120
    for left in (*np.random.default_rng().integers(3, 25, 2), 99):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "killed"), str(left)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        expected = 0 if left == 99 else -signal.SIGKILL
        assert done.returncode == expected, (left, done.stderr)
    resumed = train(tmp_path / "killed", steps=60)
    chex.assert_trees_all_equal(whole, resumed)
    name = "metrics.jsonl"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_metrics_are_the_means_since_the_last_line(tmp_path):
    train(tmp_path, learning_rate=0.0)
    errors = [np.arange(4) - batches(number) for number in range(STEPS)]
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [3, 6, 7]
    # float32 arithmetic on eight numbers of size one.
    for row, part in zip(found, (errors[:3], errors[3:6], errors[6:]), strict=True):
        np.testing.assert_allclose(row["loss"], np.square(part).sum(-1).mean(), rtol=1e-5)
        np.testing.assert_allclose(row["largest"], np.abs(part).max(-1).mean(), rtol=1e-5)


def test_a_resumed_run_writes_each_line_of_metrics_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, work=killed_at(7))  # line 6 is written, and so is the checkpoint
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1}\n{"step": 1')  # of steps undone, and cut short
    train(tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [3, 6, 7]


def test_a_finished_run_takes_no_more_steps(tmp_path):
    first = train(tmp_path)
    chex.assert_trees_all_equal(first, train(tmp_path, work=killed_at(1)))


def test_checkpoints_are_kept_by_policy(tmp_path):
    train(tmp_path, steps=12, save_every=1, keep_last=2, keep_every=5)
    assert saved(tmp_path) == [5, 10, 11, 12]


def test_a_checkpoint_holds_what_was_saved_though_the_buffers_were_donated(tmp_path):
    """The write is in the background while the next steps take the same buffers."""
    double = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
    state = double({"w": jnp.zeros((16, 1024, 1024), jnp.float32)})
    data = iter(step_dataset(batches, 9))
    with checkpoints.open_checkpoints(tmp_path) as opened:
        opened.save(1, state, data, {})
        for _ in range(3):
            state = double(state)
        jax.block_until_ready(state)
        opened.finish()
        found, _ = opened.restore(state, data)
    np.testing.assert_array_equal(found["w"], 1)
    np.testing.assert_array_equal(state["w"], 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_ends_in_one_line(tmp_path, bad):
    data = lambda step: batches(step) * np.float32(bad if step == 4 else 1)  # noqa: E731
    with pytest.raises(InputError) as error:
        train(tmp_path, data, save_every=1)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"loss is {bad} at step 5; the last checkpoint, ")
    assert saved(tmp_path)[-1] == 4  # that of step 5 would hold what cannot be used
    assert f"{tmp_path / 'checkpoints' / '4'}, is kept" in text
    assert [row["step"] for row in rows(tmp_path)] == [3]


def test_a_gradient_that_is_not_finite_ends_the_run_too(tmp_path):
    def root(params, batch):  # the loss is finite at 0, its slope is not
        return Sums(jnp.sum(jnp.sqrt(params["w"])), jnp.float32(1), {})

    optimizer = optax.sgd(0.1)
    state = init_state({"w": jnp.zeros(4)}, optimizer)
    with pytest.raises(InputError, match="grad_norm is inf at step 1; there is no checkpoint yet"):
        run(
            make_step(root, optimizer), state, step_dataset(batches, 2), steps=2, folder=tmp_path,
            save_every=1, log_every=1,
        )  # fmt: skip


def test_a_shrinking_disk_ends_in_one_line(tmp_path, monkeypatch):
    usage = checkpoints.shutil.disk_usage
    free = iter([2**30, 2**30, 2**20])
    monkeypatch.setattr(
        checkpoints.shutil, "disk_usage", lambda path: usage(path)._replace(free=next(free))
    )
    with pytest.raises(
        InputError, match="1 MiB left and the checkpoint of step 6 needs 4 MiB"
    ) as e:
        train(tmp_path)
    assert "\n" not in str(e.value)
    assert saved(tmp_path) == [2, 4]
    monkeypatch.undo()
    whole = train(tmp_path / "whole")
    chex.assert_trees_all_equal(whole, train(tmp_path))


@pytest.fixture
def no_large_files():
    """Writing more than 256 KiB into a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_the_system_refuses_ends_in_one_line(tmp_path, no_large_files, capfd):
    data = iter(step_dataset(batches, 9))
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=2**20), jnp.float32)}
    with checkpoints.open_checkpoints(tmp_path) as opened:
        opened.save(1, {"w": jnp.zeros(4)}, data, {})
        opened.save(2, state, data, {})
        with pytest.raises(InputError, match=r"writing a checkpoint failed .*File too large") as e:
            opened.finish()
    assert "\n" not in str(e.value)
    assert f"{tmp_path / '1'}, is kept" in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    def full(self, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.MetricsLog, "_write", full)
    with pytest.raises(
        InputError, match=r"writing failed \(.*No space left.*checkpoints/2, is kept"
    ):
        train(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tmp_path)
    optimizer = optax.adam(0.1)
    state = init_state({"v": jnp.zeros(3)}, optimizer)
    with pytest.raises(InputError, match="7 does not hold what this run needs"):
        run(
            make_step(loss, optimizer), state, step_dataset(batches, 9), steps=9, folder=tmp_path,
            save_every=2, log_every=3,
        )  # fmt: skip


def test_data_that_end_early_are_said(tmp_path):
    optimizer = optax.sgd(0.1)
    state = init_state({"w": jnp.zeros(4)}, optimizer)
    with pytest.raises(InputError, match="the data end before step 4"):
        run(
            make_step(loss, optimizer), state, step_dataset(batches, 3), steps=9, folder=tmp_path,
            save_every=2, log_every=3,
        )  # fmt: skip


def test_speed_has_a_file_of_its_own(tmp_path):
    train(tmp_path, work=lambda batch: Work(batch.size, 1.0))
    found = rows(tmp_path, "speed")
    assert [row["step"] for row in found] == [3, 6, 7]
    assert all(row["tokens_per_second"] > 0 for row in found)
    assert all("mfu" not in row for row in found)  # nobody knows a CPU's peak


def test_utilisation_is_flops_by_time_and_peak(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    log = metrics.MetricsLog(tmp_path, first=0, steps=9, log_every=3, pending={}, peak_flops=100.0)
    for step in (1, 2, 3):
        log.add(step, {"loss": jnp.float32(1)}, Work(50, 30.0))
    log.flush()
    log.close()
    # The first step only starts the clock; the two after it took one tick.
    assert rows(tmp_path, "speed")[0] | {"unix_time": 0} == {
        "step": 3, "unix_time": 0, "tokens_per_second": 100, "mfu": 0.6,
    }  # fmt: skip


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    class Writer(dict):
        closed = False

        def add_scalar(self, name, value, step):
            self[name, step] = value

        def close(self):
            self.closed = True

    writer = Writer()
    monkeypatch.setattr("kvjax.train.loop.open_tensorboard", lambda folder, first: writer)
    train(tmp_path, tensorboard=True)
    found = {("loss", row["step"]): row["loss"] for row in rows(tmp_path)}
    assert {key: value for key, value in writer.items() if key[0] == "loss"} == found
    assert writer.closed


def test_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r"install 'kvjax\[tensorboard\]'"):
        metrics.open_tensorboard(tmp_path, 0)


def test_nothing_is_printed_where_nobody_watches(tmp_path, capfd):
    train(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_sees_loss_and_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(tmp_path, work=lambda batch: Work(1000 * batch.size))
    last = capsys.readouterr().err.split("\r")[-1]
    assert "7/7" in last
    assert "loss=" in last
    assert "tokens/s=" in last
