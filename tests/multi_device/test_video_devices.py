"""A step of video training on eight devices: the same numbers as on one, nothing kept whole."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import numpy as np
import optax
from flax import nnx

from kvjax.diffusion import Sampler
from kvjax.models.video_dit import VideoDiT, VideoDiTConfig
from kvjax.moving_digits import MovingDigits
from kvjax.train.step import init_state, make_mesh, make_step, place_batch
from kvjax.train.video import make_batches, open_clips, video_loss
from kvjax.train.video_config import VideoConfig

config = VideoConfig(
    model=VideoDiTConfig(
        height=8, width=8, channels=1, patch=4, num_layers=1, embed_dim=16, num_heads=2, chunk=2,
        max_prefix=3, prefix_frames=2,
    ),
    steps=1, batch_size=4, digits=MovingDigits(size=8, digits=1, digit_size=6),
)
shapes = nnx.eval_shape(lambda: VideoDiT(config.model, rngs=nnx.Rngs(0)))
graph, shapes = nnx.split(shapes)
rng = np.random.default_rng(0)  # the weights that begin as zero too
params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
optimizer = optax.sgd(0.1, momentum=0.9)
batch = make_batches(config, open_clips(config, 0))(0)


def once(*sizes):
    mesh = make_mesh(*sizes)
    state = init_state(params, optimizer, mesh=mesh)
    step = make_step(video_loss(graph, config), optimizer, config.step, like=state)
    return step(state, place_batch(batch, mesh))


state, metrics = once(2, 2, 2)
alone, expected = once(1, 1, 1)
# Sums over devices are in another order: float32 rounding.
for name, value in metrics.items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-4)
jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), state.params, alone.params
)
part = lambda x: x[...].addressable_shards[0].data.shape
blocks = state.params["blocks"]
shapes = [part(blocks["temporal"]["qkv"]["kernel"]), part(blocks["prefix"]["out"]["kernel"]),
          part(state.opt_state[0].trace["blocks"]["up"]["kernel"])]
assert shapes == [(1, 8, 3, 1, 8), (1, 1, 8, 8), (1, 8, 32)], shapes
print("done")
"""


def test_eight_devices():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        capture_output=True, text=True, timeout=400, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"
