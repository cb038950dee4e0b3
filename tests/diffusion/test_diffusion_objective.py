"""The training objective: what counts, what teaches what, and what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.diffusion import draw_offset, draw_prefix, linear_schedule, noisy_clip, prefix_loss

SCHEDULE = linear_schedule()
SHAPE = (2, 9, 2, 2, 1)
X0, NOISE, PREFIX_NOISE = (jax.random.normal(jax.random.key(i), SHAPE) for i in range(3))
OUT = jax.random.normal(jax.random.key(3), (*SHAPE[:-1], 2))
STEP, PREFIX = jnp.array([0, 500]), jnp.array([1, 5])


def clip_of(**options):
    return noisy_clip(SCHEDULE, X0, NOISE, STEP, PREFIX, 4, **options)


def test_clean_frames_before_noisy_ones():
    clip = clip_of()
    np.testing.assert_array_equal(clip.x[0, :1], X0[0, :1])
    np.testing.assert_array_equal(clip.x[1, :5], X0[1, :5])
    assert clip.t.tolist() == [[0] * 9, [0] * 5 + [500] * 4]
    assert clip.target.astype(int).tolist() == [[0, 1, 1, 1, 1, 0, 0, 0, 0], [0] * 5 + [1] * 4]
    alpha_bar = SCHEDULE.alpha_bar[500]
    expected = np.sqrt(alpha_bar) * X0[1, 5:] + np.sqrt(1 - alpha_bar) * NOISE[1, 5:]
    np.testing.assert_allclose(clip.x[1, 5:], expected, atol=1e-6)


def test_a_lightly_noised_prefix_keeps_timestep_0():
    """At 100 the noise has a standard deviation of 0.324."""
    clip, plain = clip_of(prefix_step=100, prefix_noise=PREFIX_NOISE), clip_of()
    kept = np.sqrt(SCHEDULE.alpha_bar[100]) * X0[1, :5]
    np.testing.assert_allclose(clip.x[1, :5] - kept, 0.32382 * PREFIX_NOISE[1, :5], atol=1e-4)
    np.testing.assert_array_equal(clip.x[1, 5:], plain.x[1, 5:])
    np.testing.assert_array_equal(clip.t, plain.t)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_only_target_frames_count(prediction):
    clip = clip_of()

    def loss(out, x0, noise):
        return jnp.sum(prefix_loss(SCHEDULE, out, clip, x0, noise, prediction=prediction).loss)

    value, (by_out, by_x0, by_noise) = jax.value_and_grad(loss, (0, 1, 2))(OUT, X0, NOISE)
    other = ~clip.target[:, :, None, None, None]
    for gradient in (by_out, by_x0, by_noise):
        assert not np.any(np.where(other, gradient, 0))
    assert np.any(by_out)
    assert float(loss(jnp.where(other, 9.0, OUT), X0, NOISE)) == pytest.approx(float(value))


def test_means_over_the_targets():
    clip = clip_of()
    found = prefix_loss(SCHEDULE, OUT, clip, X0, NOISE)
    squared = np.asarray((OUT[..., :1] - NOISE) ** 2, np.float64)
    expected = [squared[row][np.asarray(clip.target)[row]].mean() for row in (0, 1)]
    np.testing.assert_allclose(found.mse, expected, rtol=1e-6)
    np.testing.assert_allclose(found.loss, found.mse + found.vb, rtol=1e-6)
    alone = prefix_loss(SCHEDULE, OUT[..., :1], clip, X0, NOISE)
    np.testing.assert_array_equal(alone.loss, alone.mse)


def test_an_error_of_the_data_may_count_as_one_of_v():
    """Without a bound the loss is that of v; with one it is the smaller of both weights."""
    clip, out = clip_of()._replace(step=jnp.array([100, 500])), OUT[..., :1]
    found, plain = (
        prefix_loss(SCHEDULE, out, clip, X0, NOISE, prediction="x0", x0_weight=most)
        for most in (5.0, 1.0)
    )
    np.testing.assert_array_equal(plain.loss, plain.mse)
    natural = 1 / (1 - SCHEDULE.alpha_bar[500])
    np.testing.assert_allclose(found.loss / plain.mse, [5, natural], rtol=1e-6)
    x = noisy_clip(SCHEDULE, X0, NOISE, clip.step, PREFIX, 4).x
    keep, noise = (np.sqrt(a)[:, None, None, None, None] for a in (
        SCHEDULE.alpha_bar[[100, 500]], 1 - SCHEDULE.alpha_bar[[100, 500]]
    ))  # fmt: skip
    v = (keep * x - out) / noise  # what the data say that v is
    whole = prefix_loss(SCHEDULE, out, clip, X0, NOISE, prediction="x0", x0_weight=1e9)
    as_v = prefix_loss(SCHEDULE, v, clip, X0, NOISE, prediction="v")
    np.testing.assert_allclose(whole.loss, as_v.loss, rtol=1e-4)


def test_the_bound_teaches_the_variance_alone():
    bound = lambda out: jnp.sum(prefix_loss(SCHEDULE, out, clip_of(), X0, NOISE).vb)  # noqa: E731
    gradient = jax.grad(bound)(OUT)
    assert not np.any(gradient[..., :1])
    assert np.any(gradient[..., 1:])


def test_the_bound_is_zero_for_the_truth():
    """The right noise and the posterior's own variance (at -1), at any step but the first."""
    out = jnp.concatenate([NOISE, -jnp.ones_like(NOISE)], axis=-1)
    clip = noisy_clip(SCHEDULE, X0, NOISE, jnp.array([3, 500]), PREFIX, 4)
    np.testing.assert_allclose(prefix_loss(SCHEDULE, out, clip, X0, NOISE).vb, 0, atol=1e-5)


def test_prefix_lengths():
    drawn = np.asarray(draw_prefix(jax.random.key(0), 400, 33, 8))
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [1, 9, 17, 25]
    assert counts.min() > 70  # evenly: 100 each, standard deviation 9
    assert draw_prefix(jax.random.key(0), 3, 9, 8).tolist() == [1, 1, 1]


def test_offsets_of_cyclic_positions():
    """Only clips that fill the table are shifted, by anything; or all, as the paper's text says."""
    prefix = jnp.tile(jnp.array([25, 17]), 500)
    drawn = np.asarray(draw_offset(jax.random.key(0), prefix, 8, 33))
    assert set(drawn[::2]) == set(range(33))
    assert set(drawn[1::2]) == {0}
    everywhere = np.asarray(draw_offset(jax.random.key(0), prefix, 8, 33, always=True))
    assert set(everywhere[1::2]) == set(range(33))
