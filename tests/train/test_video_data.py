"""Clips of moving digits, of videos, and of latents."""

import dataclasses

import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.models.video_config import VideoDiTConfig
from kvjax.moving_digits import MovingDigits
from kvjax.train.video_data import DigitClips, open_folder
from kvjax.video_files import write_video

pytestmark = pytest.mark.slow

MODEL = VideoDiTConfig(
    height=8, width=8, channels=3, num_layers=1, embed_dim=8, num_heads=2, chunk=2, max_prefix=3
)
LATENTS = VideoDiTConfig(
    height=2, width=2, channels=4, num_layers=1, embed_dim=8, num_heads=2, chunk=2, max_prefix=3,
    text_dim=3, text_tokens=4,
)  # fmt: skip


def counting(frames, first=0, size=8):
    """Frames whose grey is their number; steps of ten survive the codecs."""
    grey = 10 * (first + np.arange(frames, dtype=np.uint8))
    return np.broadcast_to(grey[:, None, None, None], (frames, size, size, 3))


def numbers(clip):
    return np.rint(clip.video.mean(axis=(1, 2, 3)) / 10).astype(int).tolist()


@pytest.fixture
def videos(tmp_path):
    write_video(tmp_path / "a.gif", counting(10))
    (tmp_path / "more").mkdir()
    write_video(tmp_path / "more" / "b.mp4", counting(6, 10, size=16))
    write_video(tmp_path / "short.gif", counting(2))
    (tmp_path / "notes.txt").write_text("no video")
    return tmp_path


def test_every_clip_of_a_folder_comes_once_an_epoch(videos):
    clips = open_folder(videos, MODEL, 3, seed=1)
    epochs = [[numbers(clips.clip(e * 5 + i, 3)) for i in range(5)] for e in range(3)]
    cut = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [10, 11, 12], [13, 14, 15]]
    assert [sorted(epoch) for epoch in epochs] == [cut] * 3
    assert len({str(epoch) for epoch in epochs}) > 1  # each in an order of its own
    assert clips.clip(0, 3).video.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(clips.clip(4, 2).video, clips.clip(4, 3).video[:2])


def test_frames_can_be_left_out(videos):
    clips = open_folder(videos, MODEL, 3, every=4)
    assert numbers(clips.clip(0, 3)) == [0, 4, 8]


def test_grey_models_see_grey(videos):
    clips = open_folder(videos, dataclasses.replace(MODEL, channels=1), 3)
    clip = clips.clip(0, 3)
    assert clip.video.shape == (3, 8, 8, 1)
    assert np.ptp(numbers(clip)) == 2


def test_latents_bring_their_spread_and_text(tmp_path):
    mean = np.arange(5 * 16, dtype=np.float16).reshape(5, 2, 2, 4)
    text = np.ones((2, 3))
    np.savez(tmp_path / "a.npz", mean=mean, spread=mean / 2, text=text)
    clip = open_folder(tmp_path, LATENTS, 5).clip(0, 3)
    np.testing.assert_array_equal(clip.video, mean[:3])
    np.testing.assert_array_equal(clip.spread, mean[:3] / 2)
    assert clip.text.tolist() == [[1, 1, 1]] * 2 + [[0, 0, 0]] * 2
    assert clip.text_mask.tolist() == [True, True, False, False]


def test_digits_are_a_function_of_seed_and_number():
    clips = DigitClips.load(MovingDigits(), 3)
    np.testing.assert_array_equal(
        clips.clip(5, 9).video, DigitClips.load(MovingDigits(), 3).clip(5, 12).video[:9]
    )
    assert (clips.clip(5, 9).video != clips.clip(6, 9).video).any()


def test_what_cannot_be_used_is_said(tmp_path, videos):
    with pytest.raises(InputError, match="none of 3 videos has 40 frames"):
        open_folder(videos, MODEL, 40)
    with pytest.raises(InputError, match="no such folder"):
        open_folder(tmp_path / "none", MODEL, 3)
    np.savez(videos / "bad.npz", mean=np.zeros((5, 3, 2, 4)))
    with pytest.raises(InputError, match=r"bad.npz: `mean` is \[5, 3, 2, 4\]"):
        open_folder(videos, LATENTS, 3)
    np.savez(videos / "bad.npz", mean=np.zeros((5, 2, 2, 4)))
    with pytest.raises(InputError, match="the model wants `text`"):
        open_folder(videos, LATENTS, 3).clip(0, 3)
