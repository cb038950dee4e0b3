"""Videos chunk by chunk: the cache beside full recomputation, resuming, guidance, methods."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from video_for_tests import random_video, tiny_model

from kvjax.diffusion import Sampler
from kvjax.errors import InputError
from kvjax.infer.video import (
    METHODS,
    Rollout,
    load_rollout,
    next_chunk,
    rollout,
    save_rollout,
    split_video_model,
    start,
)
from kvjax.models import video_rollout
from kvjax.models.video_dit import Text

pytestmark = pytest.mark.slow

# Random weights know no noise: data is what they predict, and is kept in range.
SAMPLER = Sampler(steps=3, prediction="x0", clip=1.0)
CA2 = Rollout(sampler=SAMPLER)
KEYS = jax.random.split(jax.random.key(3), 2)
FIRST = random_video(2, 1, seed=4)


@pytest.fixture(scope="module")
def model():
    return split_video_model(tiny_model(max_prefix=5, num_layers=2))


def chunks(model, count, first=FIRST, keys=KEYS, options=CA2, text=None):
    made = itertools.islice(rollout(model, first, keys, options, text), count)
    return np.asarray(jnp.concatenate(list(made), axis=1))


def test_the_cache_equals_recomputing_everything(model):
    """With the same noise, past the first frames that leave; 1e-4 after three steps a chunk."""
    joint = chunks(model, 3, options=dataclasses.replace(CA2, method="joint"))
    np.testing.assert_allclose(chunks(model, 3), joint, atol=1e-4)
    assert np.std(joint) > 0.1  # no clipped desert


def test_the_same_seed_makes_the_same_video(model):
    """Bit for bit, also after another video was made; another seed makes another."""
    once = chunks(model, 2)
    other = chunks(model, 2, keys=KEYS[::-1], first=FIRST[::-1])
    np.testing.assert_array_equal(chunks(model, 2), once)
    np.testing.assert_allclose(other[::-1], once, atol=1e-5)
    assert np.abs(chunks(model, 2, keys=KEYS[::-1]) - once).max() > 0.01


def test_rows_are_videos_of_their_own(model):
    np.testing.assert_allclose(
        chunks(model, 2, first=FIRST[1:], keys=KEYS[1:]), chunks(model, 2)[1:], atol=1e-5
    )


@pytest.mark.parametrize("method", ["ca2", "os-ext"])
def test_a_saved_video_goes_on(model, method, tmp_path):
    """Bit for bit."""
    options = dataclasses.replace(CA2, method=method)
    whole, state = chunks(model, 3, options=options), start(model, FIRST, KEYS, options)
    for _ in range(2):
        state, _ = next_chunk(model, state, options)
    save_rollout(tmp_path / "video", state)
    read = load_rollout(tmp_path / "video", model, options, videos=2)
    _, last = next_chunk(model, read, options)
    np.testing.assert_array_equal(last, whole[:, 8:])
    with pytest.raises(InputError, match="another model or other options"):
        load_rollout(tmp_path / "video", model, options, videos=3)


def test_files_that_are_no_videos_are_named(model, tmp_path):
    (tmp_path / "video").write_text("no")
    with pytest.raises(InputError, match="no saved video"):
        load_rollout(tmp_path / "video", model, CA2)
    with pytest.raises(InputError, match="cannot be written"):
        save_rollout(tmp_path / "folder" / "video", start(model, FIRST, KEYS, CA2))


def test_nothing_is_compiled_anew_as_the_video_grows(model):
    program = video_rollout._next_cached
    chunks(model, 1)
    before = program._cache_size()
    chunks(model, 6)
    assert program._cache_size() == before


def test_a_lightly_noised_prefix_changes_what_follows(model):
    noised = dataclasses.replace(CA2, prefix_step=100)
    assert np.abs(chunks(model, 1, options=noised) - chunks(model, 1)).max() > 1e-3


def test_guidance():
    """Two rows a video, with caches of their own: at 0 the video without text, beyond 1 neither."""
    model = split_video_model(tiny_model(max_prefix=5, num_layers=2, text_dim=6, text_tokens=3))
    text = Text(jax.random.normal(jax.random.key(7), (2, 3, 6)), jnp.ones((2, 3), bool))
    null = model.merge().no_text(2)
    pair = jax.tree.map(lambda *x: jnp.concatenate(x), null, text)

    def made(guidance, text):
        # DDIM has no use for the variance, which would be that of the rows with text.
        sampler = dataclasses.replace(SAMPLER, kind="ddim", guidance=guidance)
        return chunks(model, 2, options=Rollout(sampler=sampler), text=text)

    plain, without, strong = made(1.0, text), made(1.0, null), made(3.0, pair)
    np.testing.assert_allclose(made(0.0, pair)[:, :4], without[:, :4], atol=1e-4)
    assert np.abs(strong - plain).max() > 0.01
    assert np.abs(plain - without).max() > 0.01


def test_all_methods_agree_before_anything_is_forgotten(model):
    """The first chunk behind one frame; os-fix believes in a longer past."""
    first = {m: chunks(model, 1, options=dataclasses.replace(CA2, method=m)) for m in METHODS}
    np.testing.assert_allclose(first["os-ext"], first["ca2"], atol=1e-4)
    np.testing.assert_allclose(first["joint"], first["ca2"], atol=1e-4)
    assert np.abs(first["os-fix"] - first["ca2"]).max() > 1e-3


def test_wrong_options_are_named(model):
    with pytest.raises(InputError, match="method is 'magic'"):
        Rollout(method="magic")
    with pytest.raises(InputError, match="needs a first frame"):
        start(model, FIRST[:, :0], KEYS, CA2)
