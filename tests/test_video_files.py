"""Videos as files: what is written comes back."""

import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.video_files import count_frames, fit_frames, read_frames, read_image, write_video


def moving_bar(frames=12, height=32, width=48):
    video = np.zeros((frames, height, width, 1), np.uint8)
    for t in range(frames):
        video[t, :, 3 * t : 3 * t + 6] = 255
    return video


# A GIF keeps 256 colours of a frame, of which these have two; mp4 is lossy.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "off"), [("a.gif", 0), ("a.mp4", 8)])
def test_what_is_written_comes_back(tmp_path, name, off):
    path, video = tmp_path / "new" / name, moving_bar()
    write_video(path, video, fps=8)
    assert [path.name] == [file.name for file in path.parent.iterdir()]
    assert count_frames(path) == 12
    back = read_frames(path)
    assert back.shape == (12, 32, 48, 3)
    assert np.abs(back.astype(int) - video).mean() <= off
    part = read_frames(path, 4, 3)
    np.testing.assert_array_equal(part, back[4:7])
    np.testing.assert_array_equal(read_image(path), back[0])


def test_small_videos_are_enlarged(tmp_path):
    write_video(tmp_path / "a.gif", moving_bar(), scale=3)
    big = read_frames(tmp_path / "a.gif")
    np.testing.assert_array_equal(big[:, ::3, ::3, :1], moving_bar())


def test_frames_are_scaled_and_cut_to_fit():
    video = np.zeros((1, 20, 60, 3), np.uint8)
    video[:, :, 20:40] = 200  # the middle third is what a square of it keeps
    fitted = fit_frames(video, 10, 10)
    assert fitted.shape == (1, 10, 10, 3)
    assert (fitted[:, :, 2:-2] >= 200).all()  # bicubic overshoots a little beside an edge
    assert fit_frames(video, 20, 60) is video


@pytest.mark.parametrize("name", ["none.gif", "none.mp4", "none.png", "text.gif", "text.mp4"])
def test_what_is_no_video_is_said_in_one_line(tmp_path, name):
    (tmp_path / "text.gif").write_text("no video")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match=name) as error:
        read_image(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_short_video_and_a_strange_ending_are_refused(tmp_path):
    write_video(tmp_path / "a.gif", moving_bar(3))
    with pytest.raises(InputError, match="ends after 3 frames, before 5"):
        read_frames(tmp_path / "a.gif", 1, 4)
    with pytest.raises(InputError, match=r"unknown kind of video; use one of \.gif"):
        write_video(tmp_path / "a.txt", moving_bar())
    with pytest.raises(InputError, match="file that can be read or written"):
        write_video(tmp_path / "a.gif" / "b.gif", moving_bar())
