"""Training on eight devices: the same numbers as on one, and a run that changes its mesh."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import numpy as np
import optax
from flax import nnx

from kvjax.errors import InputError
from kvjax.models import Decoder, DecoderConfig
from kvjax.train.data import step_dataset
from kvjax.train.loop import run
from kvjax.train.losses import next_token_loss
from kvjax.train.step import StepOptions, init_state, make_mesh, make_step, place_batch

config = DecoderConfig(
    vocab_size=32, num_layers=2, embed_dim=16, mlp_dim=32, num_heads=4, num_kv_heads=2, head_dim=4,
    max_positions=16,
)
graph, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
options = StepOptions(clip_norm=1.0, ema_decay=0.9, microbatches=2)
optimizer = optax.sgd(0.1, momentum=0.9)  # Adam would make much of a gradient's rounding


def batch(step):
    return np.random.default_rng(step).integers(0, 32, (8, 9)).astype(np.int32)


def train(folder, steps, *sizes):
    state = init_state(params, optimizer, mesh=make_mesh(*sizes), ema=True)
    step = make_step(next_token_loss(graph), optimizer, options, like=state)
    state = run(
        step, state, step_dataset(batch, steps), steps=steps, folder=Path(sys.argv[1]) / folder,
        save_every=2, log_every=1,
    )
    assert step._cache_size() <= 1, step._cache_size()
    return state


def check(state, sizes):
    blocks = state.params["blocks"]
    data, fsdp, model = sizes
    parts = [
        blocks["q"]["kernel"][...].addressable_shards[0].data.shape,
        state.opt_state[0].trace["blocks"]["down"]["kernel"][...].addressable_shards[0].data.shape,
        state.ema["embed"][...].addressable_shards[0].data.shape,
    ]
    assert parts == [
        (2, 16 // fsdp, 4 // model, 4), (2, 32 // model, 16 // fsdp), (32 // model, 16 // fsdp)
    ], parts


def close(a, b):
    # Sums over devices are in another order: float32 rounding, through four steps.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


tokens = place_batch(batch(0), make_mesh(2, 2, 2))
assert tokens.addressable_shards[0].data.shape == (2, 9)
try:
    place_batch(np.zeros((6, 3)), make_mesh(2, 2, 2))
except InputError as error:
    assert "6 rows cannot be split over 4 devices" in str(error), error

check(train("moved", 2, 2, 2, 2), (2, 2, 2))
check(train("moved", 3, 1, 4, 2), (1, 4, 2))
close(train("one", 4), train("moved", 4))
lines = (Path(sys.argv[1]) / "moved" / "metrics.jsonl").read_text().splitlines()
assert len(lines) == 4, lines
print("done")
"""


def test_eight_devices(tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path)],
        capture_output=True, text=True, timeout=400, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"
