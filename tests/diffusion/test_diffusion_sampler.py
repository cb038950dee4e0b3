"""Samplers with networks whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.diffusion import Sampler, guided, sample
from kvjax.diffusion.sampler import row_noise
from kvjax.diffusion.schedule import target
from kvjax.errors import InputError

KEYS = jax.random.split(jax.random.key(0), 2)
X0 = jax.random.uniform(jax.random.key(1), (2, 3, 4), minval=-1.0)
NOISE = jax.random.normal(jax.random.key(2), X0.shape)


def knows(x0, sampler, seen=None):
    """A network that knows the data, and says so in the sampler's way."""
    schedule = sampler.schedule

    def denoise(x, t):
        step = jnp.searchsorted(jnp.asarray(schedule.timesteps), t)
        if seen is not None:
            jax.debug.callback(seen.append, t[0])
        alpha_bar = jnp.asarray(schedule.alpha_bar, jnp.float32)[step][:, None, None]
        eps = (x - jnp.sqrt(alpha_bar) * x0) / jnp.sqrt(1 - alpha_bar)
        return target(schedule, sampler.prediction, x0, eps, step)

    return denoise


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "few_step"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_who_knows_the_data_finds_it(kind, prediction):
    """The last step adds no noise."""
    sampler = Sampler(kind=kind, steps=10, prediction=prediction)
    found = sample(knows(X0, sampler), NOISE, KEYS, sampler)
    np.testing.assert_allclose(found, X0, atol=1e-4)


def test_the_network_is_told_timesteps_of_training():
    seen = []
    sampler = Sampler(steps=5)
    sample(knows(X0, sampler, seen), NOISE, KEYS, sampler).block_until_ready()
    jax.effects_barrier()
    assert sorted(int(t) for t in seen) == [0, 250, 500, 749, 999]


def normal(sampler, variance=False):
    """The best prediction for data that is itself standard normal, with the largest variance."""
    schedule = sampler.schedule

    def denoise(x, t):
        step = jnp.searchsorted(jnp.asarray(schedule.timesteps), t)
        sigma = jnp.sqrt(1 - jnp.asarray(schedule.alpha_bar, jnp.float32)[step])
        eps = sigma[:, None, None] * x
        return jnp.concatenate([eps, jnp.ones_like(eps)], axis=-1) if variance else eps

    return denoise


def test_ancestral_sampling_keeps_a_normal_distribution():
    """With the largest variance exactly, in any number of steps: 20,000 samples know it to 1 %."""
    sampler = Sampler(steps=20)
    noise = row_noise(KEYS, 7, (100, 100))
    found = sample(normal(sampler, variance=True), noise, KEYS, sampler)
    assert float(jnp.mean(found)) == pytest.approx(0, abs=0.03)
    assert float(jnp.var(found)) == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_on_a_normal_distribution(eta):
    """Each step shrinks what it has by a known factor and adds noise of a known variance."""
    sampler = Sampler(kind="ddim", steps=20, eta=eta)
    schedule, scale, variance = sampler.schedule, 1.0, 1.0
    for i in reversed(range(20)):
        after, before = schedule.alpha_bar[i], schedule.alpha_bar_before[i]
        added = eta**2 * schedule.posterior_variance[i]
        factor = np.sqrt(before * after) + np.sqrt((1 - before - added) * (1 - after))
        scale, variance = scale * factor, variance * factor**2 + added
    noise = row_noise(KEYS, 7, (100, 100))
    found = sample(normal(sampler), noise, KEYS, sampler)
    assert float(jnp.var(found)) == pytest.approx(variance, rel=0.04)
    if not eta:
        np.testing.assert_allclose(found, scale * noise, atol=1e-5)


def test_clipped_data_stays_in_its_range():
    sampler = Sampler(steps=5, clip=0.5)
    found = sample(knows(X0, sampler), NOISE, KEYS, sampler)
    np.testing.assert_allclose(found, jnp.clip(X0, -0.5, 0.5), atol=1e-4)


def test_a_rows_noise_is_its_own():
    sampler = Sampler(steps=5)
    both = sample(normal(sampler), NOISE, KEYS, sampler)
    alone = sample(normal(sampler), NOISE[1:], KEYS[1:], sampler)
    np.testing.assert_array_equal(both[1:], alone)
    assert not np.array_equal(both, sample(normal(sampler), NOISE, KEYS[::-1], sampler))


def test_guidance():
    """The prediction moves away from the one without text; the variance is the one with it."""
    null, text = jnp.array([[1.0, 5.0]]), jnp.array([[2.0, 6.0]])
    out = jnp.concatenate([null, text])
    np.testing.assert_array_equal(guided(out, 1, 1.0), text)
    np.testing.assert_array_equal(guided(out, 1, 7.5), [[1 + 7.5, 6.0]])


@pytest.mark.parametrize("options", [{"kind": "euler"}, {"prediction": "score"}, {"steps": 2000}])
def test_wrong_samplers_are_named(options):
    with pytest.raises(InputError):
        _ = Sampler(**options).schedule
