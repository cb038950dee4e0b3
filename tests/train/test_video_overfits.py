"""One clip learned by heart: training, cache and sampler together make it again (property 16)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.diffusion import Sampler
from kvjax.models.video_config import VideoDiTConfig
from kvjax.models.video_rollout import Rollout, rollout, split_video_model
from kvjax.train import video
from kvjax.train.step import StepOptions, init_state, make_step
from kvjax.train.video_config import VideoConfig
from kvjax.train.video_data import Clip
from kvjax.video_files import to_unit

FRAMES, CHUNK = 33, 8


class MovingSquare:
    """The one clip: a bright square that slides from wall to wall."""

    def clip(self, number, frames):
        pictures = np.zeros((FRAMES, 8, 8, 1), np.uint8)
        for i, picture in enumerate(pictures):
            left = 5 - abs(i % 10 - 5)
            picture[2:5, left : left + 3] = 255
        return Clip(pictures[:frames])


CONFIG = VideoConfig(
    model=VideoDiTConfig(
        height=8, width=8, channels=1, patch=4, num_layers=2, embed_dim=32, num_heads=2,
        chunk=CHUNK, max_prefix=25, learned_variance=False,
    ),
    steps=500,
    batch_size=8,
    prefix_per_row=True,
    shift=False,
    prediction="x0",
    x0_weight=5.0,
    prefix_step=100,
    learning_rate=4e-3,
    warmup_steps=20,
    adam_share=0.5,
    gates=1.0,
    step=StepOptions(clip_norm=1.0, ema_decay=0.98),
    sampler=Sampler(kind="ddim", steps=10, prediction="x0", clip=1.0),
)  # fmt: skip


def train():
    """The averaged parameters, their graph, and the error of every step."""
    graph, params = video.first_model(CONFIG)
    optimizer = video.make_optimizer(CONFIG)
    state = init_state(params, optimizer, ema=True)
    step = make_step(video.video_loss(graph, CONFIG), optimizer, CONFIG.step)
    batches, errors = video.make_batches(CONFIG, MovingSquare()), []
    for number in range(CONFIG.steps):
        state, metrics = step(state, batches(number))
        errors.append(float(metrics["mse"]))
    return graph, state.ema, np.asarray(errors)


def by_chunk(squares):
    """[32, ...] to a mean for each of the four chunks."""
    return squares.reshape(4, -1).mean(axis=1)


@pytest.mark.slow
def test_a_clip_is_learned_and_made_again():
    graph, params, errors = train()
    assert errors[-20:].mean() < errors[:5].mean() / 10
    truth = to_unit(MovingSquare().clip(0, FRAMES).video)[None]
    options = Rollout(sampler=CONFIG.sampler, prefix_step=CONFIG.generation_prefix_step)
    model = split_video_model(nnx.merge(graph, params))
    keys = jax.random.split(jax.random.key(0), 1)
    chunks = itertools.islice(rollout(model, jnp.asarray(truth[:, :1]), keys, options), 4)
    made = np.concatenate([np.asarray(chunk) for chunk in chunks], axis=1)
    repeated = np.repeat(truth[:, :-1:CHUNK], CHUNK, axis=1)  # the last true frame, all chunk long
    ours, theirs = by_chunk((made - truth[:, 1:]) ** 2), by_chunk((repeated - truth[:, 1:]) ** 2)
    assert (ours[:3] < theirs[:3]).all(), (ours, theirs)
