"""What Ca2-VDM promises of its model, on tiny random ones (all weights random).

Tolerance where nothing else is said: 1e-5 of the largest value, float32 summed in another order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from video_for_tests import Calls, clip_times, random_video

from kvjax.errors import InputError
from kvjax.models.decoder import split_layers
from kvjax.models.video_attend import WholeClip, inside_frames, to_prefix
from kvjax.models.video_config import VIDEO_DIT_SIZES
from kvjax.models.video_dit import VideoDiTConfig
from kvjax.models.video_positions import cyclic_rows
from kvjax.models.video_rollout import history_mask

VARIANTS = {
    "paper": {"prefix_attention": "paper"},
    "code": {"prefix_attention": "code", "text_dim": 6},
    "none": {"prefix_attention": "none", "mask_channel": False},
    "rope": {"prefix_attention": "none", "positions": "rope"},
    "sinks": {"prefix_attention": "code", "sink_frames": 2, "max_prefix": 11, "chunk": 3},
}
T = jnp.array([500, 30])
FRAMES = 33


@pytest.fixture(scope="module", params=VARIANTS)
def calls(request):
    return Calls(**VARIANTS[request.param])


@pytest.fixture(scope="module")
def code():
    return Calls(prefix_attention="code")


@pytest.fixture(scope="module")
def plain():
    return Calls(prefix_attention="none")


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


def error(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def recomputed(calls, video, noisy, prefix, **options):
    """The chunk behind `prefix` clean frames, from one call with all of them.

    What stands behind the chunk is of no account: nobody sees the future.
    """
    x = jnp.concatenate([video[:, :prefix], noisy, video], axis=1)[:, :FRAMES]
    options = {"mask": history_mask(calls.config, FRAMES, 1)} | options
    out = calls.whole(
        x, clip_times(prefix, FRAMES, T), prefix=jnp.full(2, prefix), text=calls.text(2), **options
    )
    return out[:, prefix : prefix + calls.config.chunk]


@pytest.mark.slow
def test_cached_equals_recomputed(calls):
    """Before and after frames have left the ring: up to 29 frames through room for 13."""
    video, chunk = random_video(2, FRAMES), calls.config.chunk
    ring = calls.ring(video, 1)
    for prefix in range(1, FRAMES - chunk, chunk):
        noisy = random_video(2, chunk, seed=prefix)
        close(calls.denoise(noisy, T, ring, calls.text(2)), recomputed(calls, video, noisy, prefix))
        ring = calls.write(video[:, prefix : prefix + chunk], ring, calls.text(2))
    assert calls.programs["denoise"]._cache_size() == 1
    assert calls.programs["write"]._cache_size() == 2  # the first frame, and a chunk


def window(calls, video, noisy, prefix):
    """The chunk from the frames in the ring alone."""
    x = jnp.concatenate([video[:, prefix - 13 : prefix], noisy], axis=1)
    frames = jnp.arange(prefix - 13, prefix + 4)
    clean = jnp.full(2, 13)
    return calls.whole(x, clip_times(13, 17, T), prefix=clean, frames=frames)[:, 13:]


@pytest.mark.slow
def test_a_cache_remembers_more_than_its_window(plain):
    """Deeper layers of cached frames have seen frames that have left; a single layer has not."""
    shallow, video = Calls(prefix_attention="none", num_layers=1), random_video(2, FRAMES)
    for calls in (plain, shallow):
        noisy = random_video(2, 4, seed=1)
        cached = calls.denoise(noisy, T, calls.ring(video, 21))
        difference = error(window(calls, video, noisy, 21), cached)
        assert difference < 1e-5 if calls is shallow else difference > 1e-3


@pytest.mark.slow
def test_prefix_keys_do_not_depend_on_the_noise(code):
    """So one cache serves all denoising steps; it is what the ring holds."""
    video = random_video(2, 9)

    def keys(t, seed, prefix_time=0):
        x = jnp.concatenate([video[:, :5], random_video(2, 4, seed)], axis=1)
        times = clip_times(5, 9, jnp.full(2, t)).at[:, :5].set(prefix_time)
        _, (k, v) = code.whole(x, times, prefix=jnp.full(2, 5), return_kv=True)
        return k[:, :, :5], v[:, :, :5]

    once, again, other = keys(900, 1), keys(20, 2), keys(900, 1, prefix_time=900)
    jax.tree.map(np.testing.assert_array_equal, once, again)
    assert error(other[0], once[0]) > 1e-2
    ring = code.ring(video, 5)
    for planes, whole in zip((ring.k, ring.v), once, strict=True):
        for layer in range(3):
            close(planes[layer][:, :, :, :5].transpose(0, 3, 1, 2, 4), whole[layer])


def test_bidirectional_attention_cannot_share():
    calls = Calls(prefix_attention="none", temporal="full", num_layers=2)
    video = random_video(2, 9)
    both = []
    for seed in (1, 2):
        x = jnp.concatenate([video[:, :5], random_video(2, 4, seed)], axis=1)
        both.append(calls.whole(x, clip_times(5, 9, T), prefix=jnp.full(2, 5), return_kv=True)[1])
    (once, _), (again, _) = both
    np.testing.assert_array_equal(
        once[0, :, :5], again[0, :, :5]
    )  # the first layer saw nothing yet
    assert error(once[1, :, :5], again[1, :, :5]) > 1e-2
    with pytest.raises(InputError, match="cannot use a cache"):
        calls.write(video[:, :1], calls.config.ring(2).init())


@pytest.mark.parametrize("frame", [1, 2])
def test_no_frame_sees_the_future(code, frame):
    """Bit for bit, in a clip and in a chunk behind the cache."""
    video, noisy = random_video(2, 5), random_video(2, 4, seed=1)
    ring = code.ring(video, 5)
    x = jnp.concatenate([video, noisy], axis=1)
    ways = {
        0: lambda x: code.denoise(x, T, ring),
        5: lambda x: code.whole(x, clip_times(5, 9, T), prefix=jnp.full(2, 5)),
    }
    for before, way in ways.items():
        x, j = noisy if before == 0 else jnp.concatenate([video, noisy], axis=1), before + frame
        plain, moved = way(x), way(x.at[:, j].add(1.0))
        np.testing.assert_array_equal(plain[:, :j], moved[:, :j])
        assert (np.abs(plain - moved).max(axis=(0, 2, 3, 4))[j:] > 0).all()


def test_cyclic_rows():
    """Frame f takes row f mod M; every window is one turn of the table."""
    rows = np.asarray(cyclic_rows(jnp.arange(600), 33))
    np.testing.assert_array_equal(rows, np.arange(600) % 33)
    begins = [1 + 8 * k for k in range(3, 70)]
    for begin in begins:
        np.testing.assert_array_equal(
            rows[begin - 25 : begin + 8], (np.arange(33) + begin - 25) % 33
        )
    assert {(begin - 25) % 33 for begin in begins} == set(range(33))
    with_sinks = np.asarray(cyclic_rows(jnp.arange(600), 33, 3))
    for begin in range(33, 590):
        assert len({*with_sinks[:3], *with_sinks[begin - 22 : begin + 8]}) == 33


def test_positions_turn_with_the_table(plain):
    """A video shifted by M frames is the same, bit for bit; shifted by 1 it is not."""
    x, times = random_video(2, 17), clip_times(13, 17, T)
    outs = [
        plain.whole(x, times, prefix=jnp.full(2, 13), frames=jnp.arange(17) + shift)
        for shift in (0, 17, 1)
    ]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert error(outs[2], outs[0]) > 1e-3


def test_unused_slots_do_not_leak(code):
    """They may hold NaN; how full the ring is does not matter."""
    video, noisy = random_video(2, 33), random_video(2, 4, seed=1)
    for prefix in (1, 5, 13, 17):
        ring = code.ring(video, prefix)
        unused = (jnp.arange(13) >= ring.length)[None, None, None, :, None]
        spoilt = jax.tree.map(lambda x: jnp.where(unused, jnp.nan, x), (ring.k, ring.v))  # noqa: B023
        bad = type(ring)(
            k=spoilt[0], v=spoilt[1], prefix_k=ring.prefix_k, prefix_v=ring.prefix_v,
            next_frame=ring.next_frame,
        )  # fmt: skip
        np.testing.assert_array_equal(code.denoise(noisy, T, bad), code.denoise(noisy, T, ring))


def test_one_timestep_a_row_or_one_a_frame(plain):
    x = random_video(2, 9)
    wide = jnp.broadcast_to(T[:, None], (2, 9))
    close(plain.whole(x, wide), plain.whole(x, T), 1e-6)


@pytest.mark.slow
def test_prefix_attention():
    """Keys thrice are keys once; fewer frames than wanted are the first one again."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 3, 4, 4, 8)) for i in range(3))
    thrice = to_prefix((q[:, :1], k, v), *(jnp.repeat(x[:, :1], 3, axis=1) for x in (k, v)), False)
    close(thrice, inside_frames(q[:, :1], k[:, :1], v[:, :1]), 1e-6)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_one_prefix_for_all_rows_is_a_prefix_of_each(prefix, own):
    qkv = tuple(jax.random.normal(jax.random.key(i), (2, 6, 4, 2, 8)) for i in range(3))
    of_each, of_all = (
        WholeClip(prefix=x, mask=jnp.ones((1, 6, 6), bool), prefix_frames=3).spatial(qkv, None, own)
        for x in (jnp.full(2, prefix), prefix)
    )
    close(of_all, of_each, 1e-6)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_prefix_attention_sees_the_last_frames_alone(variant):
    """With one layer and no time: frames older than the last three change nothing."""
    calls = Calls(prefix_attention=variant, num_layers=1, mask_channel=False)
    out = calls.params["blocks"]["temporal"]["out"]
    calls.params["blocks"]["temporal"]["out"] = jax.tree.map(jnp.zeros_like, out)
    video, noisy = random_video(2, 9), random_video(2, 4, seed=1)
    ring = calls.ring(video, 9)
    plain = calls.denoise(noisy, T, ring)
    older, newer = (calls.ring(video.at[:, i].add(1.0), 9) for i in (5, 6))
    np.testing.assert_array_equal(calls.denoise(noisy, T, older), plain)
    assert error(calls.denoise(noisy, T, newer), plain) > 1e-3


@pytest.mark.slow
def test_chunks_shorter_than_the_prefix(code):
    """The last three frames are kept across writes of two."""
    calls = Calls(prefix_attention="code", chunk=2)
    video, ring = random_video(2, FRAMES), calls.config.ring(2).init()
    ring = calls.write(video[:, :1], ring)
    for prefix in (1, 3, 5, 7):
        noisy = random_video(2, 2, seed=prefix)
        close(calls.denoise(noisy, T, ring), recomputed(calls, video, noisy, prefix))
        ring = calls.write(video[:, prefix : prefix + 2], ring)


@pytest.mark.slow
def test_rows_do_not_mix(code):
    video, noisy = random_video(2, 5), random_video(2, 4, seed=1)
    together = code.denoise(noisy, T, code.ring(video, 5))
    for row in (0, 1):
        one = slice(row, row + 1)
        alone = code.denoise(noisy[one], T[one], code.ring(video[one], 5))
        close(alone, together[one])


def flops(program, *args, **kwargs):
    return program.lower(*args, **kwargs).compile().cost_analysis()["flops"]


def test_a_call_costs_the_same_however_long_the_video_is(plain):
    """One program whatever was written; without the cache the history costs more and more."""
    params, layers = split_layers(plain.params)  # XLA counts a loop's body once
    ring, noisy = plain.config.ring(1).init(), random_video(1, 4)
    cached = flops(plain.programs["denoise"], params, noisy, T[:1], ring, layers=layers)
    costs = [
        flops(plain.programs["whole"], params, random_video(1, n + 4), T[:1], layers=layers)
        for n in (5, 9)
    ]
    assert [cost / cached for cost in costs] == pytest.approx([9 / 4, 13 / 4], rel=0.15)


def test_partial_chunks_see_all_of_themselves():
    calls = Calls(prefix_attention="none", temporal="partial")
    video, noisy = random_video(2, FRAMES), random_video(2, 4, seed=1)
    cached = calls.denoise(noisy, T, calls.ring(video, 5))
    x = jnp.concatenate([video[:, :5], noisy], axis=1)
    close(cached, calls.whole(x, clip_times(5, 9, T), prefix=jnp.full(2, 5))[:, 5:])
    moved = calls.denoise(noisy.at[:, 3].add(1.0), T, calls.ring(video, 5))
    assert error(moved[:, :1], cached[:, :1]) > 1e-3


def test_sizes_are_the_papers():
    """754.9 million parameters with the released prefix attention, 606.1 without."""

    def count(**options):
        from flax import nnx

        from kvjax.models.video_dit import VideoDiT

        config = VideoDiTConfig(**({"height": 32, "width": 32, "num_layers": 28, "embed_dim": 1152,
                                    "num_heads": 16} | options))  # fmt: skip
        shapes = nnx.state(nnx.eval_shape(lambda: VideoDiT(config, rngs=nnx.Rngs(0))))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6

    assert count() == pytest.approx(754.9, abs=0.1)
    assert count(prefix_attention="none") == pytest.approx(606.1, abs=0.1)
    assert VIDEO_DIT_SIZES["B/2"].num_layers == 14


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch": 3}, "patches"),
        ({"embed_dim": 30}, "heads"),
        ({"temporal": "acausal"}, "temporal is 'acausal'"),
    ],
)
def test_wrong_sizes_are_named(options, message):
    with pytest.raises(InputError, match=message):
        Calls(**options)


def test_wrong_videos_are_named(plain):
    with pytest.raises(InputError, match="do not fit a model"):
        plain.whole(random_video(2, 3, channels=3), T)
    with pytest.raises(InputError, match="more positions"):
        plain.denoise(random_video(2, 8), T, plain.config.ring(2).init())
