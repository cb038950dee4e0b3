"""The training of video models, from its command line to the model that it exports."""

import contextlib
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.diffusion import Sampler
from kvjax.errors import InputError
from kvjax.models.video_config import VideoDiTConfig
from kvjax.models.video_dit import VideoDiT
from kvjax.models.video_folder import load_video_model
from kvjax.moving_digits import MovingDigits
from kvjax.train import video
from kvjax.train.step import StepOptions
from kvjax.train.video_config import VideoConfig, read_config
from kvjax.video_files import read_frames

pytestmark = pytest.mark.slow

CONFIG = VideoConfig(
    model=VideoDiTConfig(
        height=8, width=8, channels=1, patch=4, num_layers=1, embed_dim=16, num_heads=2, chunk=2,
        max_prefix=3, prefix_frames=2,
    ),
    steps=4,
    batch_size=2,
    digits=MovingDigits(size=8, digits=1, digit_size=6),
    prefix_step=50,
    sampler=Sampler(kind="ddim", steps=2, prediction="v", clip=1.0),
    step=StepOptions(clip_norm=1.0, ema_decay=0.5, microbatches=2),
    remat="layer",
    samples=2,
    save_every=3,
    log_every=2,
)  # fmt: skip


@pytest.fixture
def toy(monkeypatch):
    """Makes the toy config the one that `--config video_tiny` reads."""
    monkeypatch.setattr(video, "read_config", lambda name: CONFIG)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's folder and what the command printed last."""
    folder, out = tmp_path_factory.mktemp("run"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(video, "read_config", lambda name: CONFIG)
        assert video.main(["--out", str(folder), "--json"]) == 0
    return folder, json.loads(out.getvalue().splitlines()[-1])


def awake(config, seed=0):
    """A model none of whose weights is zero, split; else most of it would be idle."""
    graph, params = nnx.split(nnx.eval_shape(lambda: VideoDiT(config.model, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    return graph, jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), params)


def test_batches_draw_every_prefix_and_repeat_nothing():
    batches = video.make_batches(CONFIG, video.open_clips(CONFIG, CONFIG.seed))
    found = [batches(step) for step in range(12)]
    assert {int(batch.prefix[0]) for batch in found} == {1, 3}
    for batch in found:
        assert (batch.prefix == batch.prefix[0]).all()
        assert batch.video.shape == (2, batch.prefix[0] + 2, 8, 8, 1)
    assert len({batch.video.tobytes() for batch in found}) == 12
    assert len({int(seed) for batch in found for seed in batch.seed}) == 24
    again = video.make_batches(CONFIG, video.open_clips(CONFIG, CONFIG.seed))(3)
    np.testing.assert_array_equal(again.video, found[3].video)
    np.testing.assert_array_equal(again.seed, found[3].seed)


def test_rows_may_draw_prefixes_of_their_own():
    config = dataclasses.replace(CONFIG, prefix_per_row=True, batch_size=8)
    batch = video.make_batches(config, video.open_clips(config, 0))(0)
    assert set(batch.prefix.tolist()) == {1, 3}
    assert batch.video.shape == (8, 5, 8, 8, 1)


def test_what_a_row_loses_does_not_depend_on_its_batch():
    graph, params = awake(CONFIG)
    loss = jax.jit(video.video_loss(graph, CONFIG))
    batch = video.make_batches(CONFIG, video.open_clips(CONFIG, 0))(0)
    parts = [jax.tree.map(lambda x: x[i : i + 1], batch) for i in range(2)]  # noqa: B023
    whole, single = loss(params, batch), [loss(params, part) for part in parts]
    assert whole.weight == 2
    # float32 sums of other shapes
    np.testing.assert_allclose(whole.loss, sum(s.loss for s in single), rtol=1e-5)
    assert whole.metrics["vb"] > 0
    np.testing.assert_allclose(whole.loss, whole.metrics["mse"] + whole.metrics["vb"], rtol=1e-5)


def test_every_clip_begins_at_a_row_of_its_own():
    keys = jax.vmap(jax.random.key)(jnp.arange(400, dtype=jnp.uint32))
    offsets = np.asarray(video._offsets(CONFIG, keys, jnp.full(400, 1, jnp.int32)))
    assert set(offsets[:, 0].tolist()) == set(range(CONFIG.model.table))
    released = dataclasses.replace(CONFIG, shift=False)
    assert not np.asarray(video._offsets(released, keys, jnp.full(400, 1, jnp.int32))).any()
    full = np.asarray(video._offsets(released, keys, jnp.full(400, 3, jnp.int32)))
    assert set(full[:, 0].tolist()) == set(range(CONFIG.model.table))


def test_latents_are_drawn_and_texts_dropped():
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, text_dim=3, text_tokens=2),
        text_dropout=0.5,
    )
    graph, params = awake(config)
    model = nnx.merge(graph, params)
    rows = 200
    mean = np.zeros((rows, 3, 8, 8, 1), np.float32)
    batch = video.Batch(
        mean, np.ones(rows, np.int32), np.arange(rows, dtype=np.uint32), mean + 2,
        np.ones((rows, 2, 3), np.float32), np.ones((rows, 2), bool),
    )  # fmt: skip
    keys = jax.vmap(jax.random.key)(batch.seed)
    spread = float(jnp.std(video._latents(batch, keys)))
    assert abs(spread - 2) < 0.02  # of 38,400 draws
    text = video._text(model, config, batch, keys)
    dropped = float(jnp.mean((text.embed[:, 0, 0] != 1).astype(jnp.float32)))
    assert 0.35 < dropped < 0.65
    sums = jax.jit(video.video_loss(graph, config))(params, batch)
    assert np.isfinite(sums.loss)
    with pytest.raises(InputError, match="the data no text"):
        video._text(model, config, batch._replace(text=None), keys)


def test_command_trains_samples_and_exports(run):
    folder, result = run
    assert result["steps"] == 4
    assert result["loss"] == pytest.approx(result["mse"] + result["vb"], rel=1e-3)
    model = load_video_model(folder)
    assert model.config == CONFIG.model
    assert (model.sampler, model.prefix_step) == (CONFIG.sampler, 50)
    assert MovingDigits(**model.data["digits"]) == CONFIG.digits
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "000003.gif", "000004.gif",
    ]  # fmt: skip
    # One prefix and two chunks of two; two videos of 10 pixels with their frames, twice as large.
    assert read_frames(folder / "samples" / "000004.gif").shape == (5, 20, 80, 3)
    speed = [json.loads(line) for line in (folder / "speed.jsonl").read_text().splitlines()]
    assert speed[-1]["tokens_per_second"] > 0


def test_a_killed_command_ends_with_the_same_weights(run, toy, tmp_path, monkeypatch):
    draw = video.DigitClips.clip

    def interrupt(self, number, frames):
        if self.seed == CONFIG.seed and number == 6:  # of the last step
            raise KeyboardInterrupt
        return draw(self, number, frames)

    monkeypatch.setattr(video.DigitClips, "clip", interrupt)
    with pytest.raises(KeyboardInterrupt):
        video.main(["--out", str(tmp_path)])
    monkeypatch.setattr(video.DigitClips, "clip", draw)
    video.main(["--out", str(tmp_path)])
    for name in ("model/model.safetensors", "metrics.jsonl", "samples/000004.gif"):
        assert (tmp_path / name).read_bytes() == (run[0] / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--model.max-prefix", "4"], "max_prefix is 4"),
        (["--model.temporal", "full"], "needs 'causal' or 'partial'"),
        (["--prediction", "eps"], "predicts 'eps' and sampler.prediction is 'v'"),
        (["--prefix-step", "1000"], "prefix_step is 1000"),
        (["--digits.size", "16"], "moving digits are 16 x 16"),
        (["--weights", "int8"], "weights is 'int8'"),
        (["--data", "no/such/folder"], "no such folder"),
        (["--remat", "all"], "remat is 'all'"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(toy, tmp_path, options, message):
    with pytest.raises(InputError, match=message) as error:
        video.main(["--out", str(tmp_path / "run"), *options])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_built_in_config_fits_the_moving_digits():
    config = read_config("video_tiny")
    assert config.prefixes == (1, 9)
    clip = video.open_clips(config, 0).clip(0, config.frames)
    assert clip.video.shape == (17, 32, 32, 1)
    shapes = nnx.eval_shape(lambda: VideoDiT(config.model, rngs=nnx.Rngs(0)))
    bfloat16 = 2 * sum(x.size for x in jax.tree.leaves(nnx.state(shapes)))
    assert bfloat16 < 10e6
    with pytest.raises(InputError, match=r"no config 'video_huge'.*video_tiny"):
        read_config("video_huge")
