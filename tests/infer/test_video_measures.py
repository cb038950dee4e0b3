"""What is said of generated videos: hand cases, closed forms, and an outside square root."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.errors import InputError
from kvjax.infer.video_measures import (
    clip_features,
    digit_agreement,
    frame_errors,
    frechet_distance,
    load_i3d,
    windows,
)
from kvjax.models.frame_features import ClipFeatures, DigitClassifier, Network, crop_digits
from kvjax.moving_digits import MovingDigits, load_digit_images

IMAGES = load_digit_images("test")


def test_errors_are_means_of_squares_by_frame():
    truth = np.zeros((2, 3, 4, 4, 1), np.uint8)
    videos = truth.copy()
    videos[0, 1] = 255  # one of two videos is all wrong in its second frame
    videos[:, 2, 0, 0] = 51
    np.testing.assert_allclose(frame_errors(videos, truth), [0, 0.5, 0.2**2 / 16])


@given(st.integers(0, 1000), st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_frechet_distance_is_that_of_normals(seed, size):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(50, size)) @ rng.normal(size=(size, size)) for _ in range(2))
    b += 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * cross)
    # sqrtm of an ill-conditioned product loses half of float64's digits.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9, abs=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    shift = rng.normal(size=size)
    assert frechet_distance(a, a + shift) == pytest.approx(np.sum(shift**2), rel=1e-9)
    few = frechet_distance(a[:2], b[:2])  # defined with fewer clips than features too
    assert np.isfinite(few)


def test_one_clip_has_no_covariance():
    with pytest.raises(InputError, match="1 and 5 clips"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))


def test_crops_are_the_squares_around_digits():
    moving = MovingDigits()
    scene = moving.scene(IMAGES, 0, 3, 12)
    frames = moving.frames(scene).astype(np.float32) * (2 / 255) - 1
    crops = crop_digits(frames, scene.corners, moving.digit_size)
    assert crops.shape == (12, 2, 16, 16, 1)
    alone = MovingDigits(digits=1)
    only = alone.frames(type(scene)(
        scene.images[:1], scene.labels[:1], scene.corners[:, :1], scene.velocity[:1]
    ))  # fmt: skip
    ink = (crop_digits(only / 127.5 - 1, scene.corners[:, :1], 14) + 1).sum(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(ink, only.sum(axis=(1, 2, 3)) / 127.5, rtol=1e-5)


class SaysItsBrightness(nnx.Module):
    """Stands for a classifier: the digit is how bright the crop is, in steps of a tenth."""

    def __call__(self, x):
        level = (x.mean(axis=(1, 2, 3)) + 1) / 2 * 10
        return -jnp.abs(level[:, None] - jnp.arange(10.0)[None] - 0.5)


def test_agreement_asks_where_the_digit_should_be():
    moving = MovingDigits(digits=2)
    scene = moving.scene(IMAGES, 0, 5, 20)
    graph, params = nnx.split(SaysItsBrightness())
    network = Network(graph, params)
    # Patches of even brightness in place of digits. A crop reaches a pixel over the edges of a
    # digit, and over those of the frame, where it is black: 225 of its 256 pixels are bright.
    corners = np.asarray([[[0.0, 0.0], [18.0, 18.0]]] * 4)
    corners[3, 1] = [4.0, 4.0]  # they touch: nothing is asked
    labels = np.asarray([3, 7])
    scene = type(scene)(scene.images, labels, corners, scene.velocity)
    video = np.zeros((1, 4, 32, 32, 1), np.uint8)
    video[:, :, :16, :16] = round(255 * 0.45)
    video[:, :, 16:, 16:] = round(255 * 0.85)
    video[0, 1, 16:, 16:] = 0
    share = digit_agreement(network, moving, video, [scene])
    np.testing.assert_array_equal(share, [1, 0.5, 1, np.nan])


def test_networks_take_what_they_are_given():
    clips, crops = np.zeros((3, 16, 32, 32, 1), np.float32), np.zeros((3, 16, 16, 1), np.float32)
    shapes = [
        nnx.eval_shape(lambda x: ClipFeatures(rngs=nnx.Rngs(0))(x), clips),
        *nnx.eval_shape(lambda x: ClipFeatures(rngs=nnx.Rngs(0)).digits_and_motion(x), clips),
        nnx.eval_shape(lambda x: DigitClassifier(rngs=nnx.Rngs(0))(x), crops),
    ]
    assert [x.shape for x in shapes] == [(3, 64), (3, 10), (3, 4), (3, 10)]


def test_windows_end_with_the_video():
    videos = np.arange(20)[None]
    assert windows(videos, 4)[0].tolist() == list(range(4, 20))
    with pytest.raises(InputError, match="20 frames have no 16 from 5 on"):
        windows(videos, 5)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_users_i3d_is_asked_as_stylegan_v_asks_it(tmp_path):
    torch = pytest.importorskip("torch")

    class Means(torch.nn.Module):
        def forward(self, x, rescale: bool, resize: bool, return_features: bool):
            assert not rescale and not resize and return_features
            assert x.size(1) == 3 and x.size(3) == 224 and x.size(4) == 224
            return x.mean(dim=[3, 4]).reshape(1, -1)

    torch.jit.script(Means()).save(str(tmp_path / "i3d.pt"))
    clips = np.zeros((2, 16, 32, 32, 1), np.uint8)
    clips[1, 5:] = 255
    found = load_i3d(tmp_path / "i3d.pt")(clips)
    assert found.shape == (2, 48)
    np.testing.assert_allclose(found[0], -1, atol=1e-6)
    np.testing.assert_allclose(found[1].reshape(3, 16)[:, 5:], 1, atol=1e-6)
    (tmp_path / "bad.pt").write_text("none")
    with pytest.raises(InputError, match="no TorchScript file"):
        load_i3d(tmp_path / "bad.pt")


def test_clips_are_padded_once():
    seen = []

    def network(x):
        seen.append(len(x))
        return x.reshape(len(x), -1)[:, :1]

    found = clip_features(network, np.full((5, 1, 1, 1, 1), 255, np.uint8), rows=2)
    assert seen == [2, 2, 2]
    np.testing.assert_array_equal(found, np.ones((5, 1)))
