"""Videos become latents that training can read."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from kvjax.errors import InputError
from kvjax.models.autoencoder import load_autoencoder
from kvjax.models.video_config import VideoDiTConfig
from kvjax.train.video_data import open_folder
from kvjax.train.video_latents import main
from kvjax.video_files import to_unit, write_video

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "models" / "autoencoder_kl"


def test_latents_are_the_posterior_of_every_frame(tmp_path, capsys):
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    frames[:, :8] = 40 * np.arange(5, dtype=np.uint8)[:, None, None, None]
    write_video(tmp_path / "videos" / "sub" / "a.gif", frames)
    argv = [str(tmp_path / "videos"), str(tmp_path / "latents"), "--autoencoder", str(FOLDER),
            "--size", "16", "--rows", "2"]  # fmt: skip
    assert main(argv) == 0
    model = VideoDiTConfig(height=4, width=4, num_layers=1, embed_dim=8, num_heads=2, chunk=2)
    clip = open_folder(tmp_path / "latents", model, 5).clip(0, 5)
    _, graph, params = load_autoencoder(FOLDER)
    mean, spread = nnx.merge(graph, params).encode(to_unit(frames))
    np.testing.assert_allclose(clip.video, mean, atol=2e-3)  # float16
    np.testing.assert_allclose(clip.spread, spread, atol=2e-3)
    assert main(argv) == 0
    assert "0 videos encoded" in capsys.readouterr().err
    with pytest.raises(InputError, match="no videos there"):
        main([str(tmp_path / "latents"), *argv[1:]])
