"""`kvjax video` as a person types it, with a tiny random model."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from kvjax.diffusion import Sampler
from kvjax.infer.cli import main
from kvjax.models.video_dit import VideoDiT, VideoDiTConfig
from kvjax.models.video_folder import VideoModel, save_video_model
from kvjax.moving_digits import MovingDigits, load_digit_images
from kvjax.video_files import count_frames, read_frames, write_video

pytestmark = pytest.mark.slow

CONFIG = VideoDiTConfig(
    height=8, width=8, channels=1, patch=4, num_layers=2, embed_dim=16, num_heads=2, chunk=2,
    max_prefix=3, prefix_frames=2,
)  # fmt: skip


def save(folder, config=CONFIG, data=None):
    graph, params = nnx.split(nnx.eval_shape(lambda: VideoDiT(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)  # the weights that begin as zero too
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), params)
    sampler = Sampler(kind="ddim", steps=2, prediction="v", clip=1.0)
    model = VideoModel(config, graph, params, sampler, 20, data or {})
    save_video_model(folder, model)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    digits = {"size": 8, "digits": 1, "digit_size": 6, "slowest": 0.5, "fastest": 1.0}
    return save(tmp_path_factory.mktemp("model"), data={"digits": digits})


def video(*options):
    return main(["video", "--scale", "1", *map(str, options)])


def test_a_video_begins_with_the_seeds_digits_and_has_the_frames_asked(model, tmp_path, capsys):
    out = tmp_path / "new" / "a.gif"
    assert video("--model", model, "--seed", 3, "--frames", 8, "--out", out, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["frames"], figures["method"]) == (8, "ca2")
    frames = read_frames(out)
    assert frames.shape == (8, 8, 8, 3)
    moving = MovingDigits(size=8, digits=1, digit_size=6, slowest=0.5, fastest=1.0)
    first = moving.video(load_digit_images("test"), 3, 0, 1)[0]
    np.testing.assert_array_equal(frames[0, ..., :1], first)
    assert (frames[1] != frames[0]).any()


def test_the_same_seed_makes_the_same_file_and_longer_ones_begin_alike(model, tmp_path):
    for name, seed, frames in (("a", 1, 6), ("b", 1, 6), ("c", 2, 6), ("d", 1, 9)):
        out = tmp_path / f"{name}.gif"
        video("--model", model, "--seed", seed, "--frames", frames, "--out", out)
    a, b, c, d = (read_frames(tmp_path / f"{name}.gif") for name in "abcd")
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    np.testing.assert_array_equal(d[:6], a)


def test_a_picture_or_a_video_gives_the_first_frame(model, tmp_path):
    big = np.zeros((2, 16, 32, 1), np.uint8)
    big[0, :, 8:24] = 255  # what a square keeps is white
    write_video(tmp_path / "first.gif", big)
    out = tmp_path / "a.mp4"
    options = ("--frames", 3, "--first-frame", tmp_path / "first.gif", "--out", out, "--scale", 4)
    assert video("--model", model, *options) == 0
    assert count_frames(out) == 3
    frames = read_frames(out)
    assert frames.shape == (3, 32, 32, 3)
    assert frames[0].mean() > 230  # mp4 is lossy


@pytest.mark.parametrize("method", ["os-ext", "os-fix", "joint"])
def test_the_other_methods_make_videos_too(model, tmp_path, method):
    out = tmp_path / "a.gif"
    assert video("--model", model, "--frames", 4, "--method", method, "--out", out) == 0
    assert count_frames(out) == 4


def test_what_cannot_be_done_is_said_in_one_line(model, tmp_path, capsys):
    latents = save(tmp_path / "latents", VideoDiTConfig(
        height=8, width=8, channels=4, num_layers=1, embed_dim=16, num_heads=2
    ))  # fmt: skip
    plain = save(tmp_path / "plain")
    for options, said in [
        (("--model", model, "--out", "a.txt"), "unknown kind of video"),
        (("--model", model, "--frames", 0), "--frames must be 1 or more"),
        (("--model", tmp_path / "none"), "no video model there"),
        (("--model", model, "--method", "fast"), "method is 'fast'"),
        (("--model", model, "--sampler", "euler"), "sampler is 'euler'"),
        (("--model", model, "--guidance", 2), "this model knows none"),
        (("--model", model, "--text", "a.npz"), "knows no texts"),
        (("--model", model, "--first-frame", tmp_path / "none.png"), "No such file"),
        (("--model", plain), "give it a --first-frame"),
        (("--model", latents), "give --autoencoder the folder"),
    ]:
        out = () if "--out" in options else ("--out", tmp_path / "a.gif")
        assert video(*options, *out) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_a_model_with_text_follows_it(tmp_path):
    config = VideoDiTConfig(
        height=8, width=8, channels=1, patch=4, num_layers=1, embed_dim=16, num_heads=2, chunk=2,
        max_prefix=3, text_dim=3, text_tokens=4,
    )  # fmt: skip
    model = save(tmp_path / "model", config)
    write_video(tmp_path / "first.gif", np.zeros((1, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "text.npz", text=np.full((2, 3), 9.0))
    made = []
    for options in ((), ("--text", tmp_path / "text.npz"),
                    ("--text", tmp_path / "text.npz", "--guidance", 3)):  # fmt: skip
        out = tmp_path / f"{len(made)}.gif"
        first = ("--first-frame", tmp_path / "first.gif")
        assert video("--model", model, "--frames", 3, *first, "--out", out, *options) == 0
        made.append(read_frames(out))
    assert (made[0] != made[1]).any()
    assert (made[1] != made[2]).any()
