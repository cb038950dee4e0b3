"""Moving digits obey their laws of motion."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.errors import InputError
from kvjax.moving_digits import MovingDigits, load_digit_images

IMAGES = load_digit_images()
indices = st.integers(0, 10_000)


@given(indices)
@settings(max_examples=20, deadline=None)
def test_digits_fly_straight_until_a_wall_and_leave_it_as_light_does(index):
    moving = MovingDigits()
    scene = moving.scene(IMAGES, 3, index, 60)
    room = moving.size - moving.digit_size
    assert scene.corners.min() >= 0
    assert scene.corners.max() <= room
    steps = np.diff(scene.corners, axis=0)
    whole = np.abs(np.abs(steps) - np.abs(scene.velocity)) < 1e-9  # rounding of float64
    # In the one frame of a bounce the way is folded: shorter, and at the wall.
    before, after = scene.corners[:-1], scene.corners[1:]
    gap = np.minimum(np.minimum(before, after), room - np.maximum(before, after))
    assert (whole | (gap <= np.abs(scene.velocity))).all()
    assert whole.mean() > 0.7
    speed = np.linalg.norm(scene.velocity, axis=-1)
    assert (speed >= moving.slowest).all()
    assert (speed <= moving.fastest).all()


@given(indices, st.integers(2, 40))
@settings(max_examples=10, deadline=None)
def test_a_longer_video_begins_as_the_shorter_one(index, frames):
    moving = MovingDigits()
    video = moving.video(IMAGES, 1, index, 40)
    assert video.dtype == np.uint8
    assert video.shape == (40, 32, 32, 1)
    np.testing.assert_array_equal(video[:frames], moving.video(IMAGES, 1, index, frames))
    assert (video != moving.video(IMAGES, 2, index, 40)).any()


def test_a_digit_stands_where_its_corner_says():
    moving = MovingDigits(digits=1, digit_size=8)
    scene = moving.scene(IMAGES, 0, 0, 2)
    corners = np.asarray([[[5.0, 11.0]], [[5.5, 11.0]]])
    frames = moving.frames(dataclasses.replace(scene, corners=corners))[..., 0]
    ink = np.rint(255 * scene.images[0]).astype(np.uint8)
    np.testing.assert_array_equal(frames[0, 5:13, 11:19], ink)
    assert frames[0].sum() == ink.sum()
    # Half a pixel lower, each row is the mean of two.
    below = (scene.images[0][:-1] + scene.images[0][1:]) / 2
    np.testing.assert_allclose(frames[1, 6:13, 11:19], 255 * below, atol=0.51)


def test_where_digits_cross_the_brighter_one_is_seen():
    moving = MovingDigits(digits=2)
    scene = moving.scene(IMAGES, 0, 1, 30)
    alone = [
        moving.frames(dataclasses.replace(
            scene, images=scene.images[i : i + 1], corners=scene.corners[:, i : i + 1]
        ))
        for i in range(2)
    ]  # fmt: skip
    assert ((alone[0] > 0) & (alone[1] > 0)).any()
    np.testing.assert_array_equal(moving.frames(scene), np.maximum(*alone))


def test_splits_share_no_image():
    test = load_digit_images("test")
    assert len(IMAGES.labels) == 1500
    assert len(test.labels) == 297
    assert set(test.labels) == set(range(10))
    assert IMAGES.images.max() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"digits": 0}, "0 digits"), ({"size": 8}, "frames of 8"), ({"slowest": 9}, "speeds from 9")],
)
def test_what_cannot_be_made_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        MovingDigits(**options)
    with pytest.raises(InputError, match="no split 'all'"):
        load_digit_images("all")
