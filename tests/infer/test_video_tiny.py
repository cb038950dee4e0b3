"""The built-in video model and its judges: that they fit, and do what their card says."""

import json
from importlib import resources

import imageio.v3 as iio
import jax
import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.infer.bench.video_quality import main
from kvjax.models.frame_features import load_network
from kvjax.models.video_folder import load_video_model
from kvjax.train.video_config import read_config

pytestmark = pytest.mark.slow


def test_the_files_take_less_than_12_megabytes():
    folder = resources.files("kvjax.models") / "video_tiny"
    sizes = [file.stat().st_size for file in folder.iterdir() if file.is_file()]
    assert sum(sizes) < 12e6


def test_the_model_is_the_configs():
    model, config = load_video_model("video-tiny"), read_config("video_tiny")
    assert model.config == config.model
    assert model.sampler == config.sampler
    assert model.prefix_step == config.generation_prefix_step
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(model.params))


@pytest.mark.parametrize("kind", ["digits", "clips"])
def test_the_judges_are_there(kind):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load_network(kind).params))


def test_videos_go_on_as_the_motion_says(tmp_path, capsys):
    size = ["--videos", "4", "--rows", "4", "--chunks", "1"]
    assert main([*size, "--png", str(tmp_path / "curves.png"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(figures["mse"]) == len(figures["digit_agreement"]) == 1
    # Of 256 videos: 0.007 beside 0.065, and 0.95.
    assert figures["mse"][0] < figures["mse_of_last_frame_repeated"][0] / 4
    assert figures["digit_agreement"][0] > 0.8
    assert figures["digit_agreement_of_truth"][0] > 0.8
    height, width, _ = iio.imread(tmp_path / "curves.png").shape
    assert width > 2 * height  # three panels side by side


def test_a_picture_wants_a_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        main(["--png", str(tmp_path / "no" / "curves.png")])
