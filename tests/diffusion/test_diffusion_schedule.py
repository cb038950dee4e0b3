"""The paper's constants, and the algebra between data, noise and predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.diffusion import Sampler, add_noise, linear_schedule, respace, split_output
from kvjax.diffusion.schedule import PREDICTIONS, target
from kvjax.errors import InputError


def test_what_is_left_of_the_data():
    alpha_bar = linear_schedule().alpha_bar[[0, 50, 100, 999]]
    np.testing.assert_allclose(alpha_bar, [0.9999, 0.969951, 0.895142, 4.03583e-5], rtol=1e-6)


def test_a_hundred_of_a_thousand_steps():
    spaced = respace(linear_schedule(), 100)
    assert spaced.timesteps[:8].tolist() == [0, 10, 20, 30, 40, 50, 61, 71]
    assert spaced.timesteps[-3:].tolist() == [979, 989, 999]
    assert spaced.timesteps.sum() == 49950
    np.testing.assert_allclose(spaced.beta[:3], [1e-4, 2.0936e-3, 4.0801e-3], rtol=2e-5)
    assert spaced.beta[-1] == pytest.approx(0.182180, rel=3e-6)
    # The noise that is left is the same, however many steps lead there.
    np.testing.assert_array_equal(spaced.alpha_bar, linear_schedule().alpha_bar[spaced.timesteps])


def test_few_steps_leave_out_the_last_timesteps():
    assert Sampler(kind="few_step", steps=4).schedule.timesteps.tolist() == [249, 499, 749, 999]


@pytest.mark.parametrize("steps", [0, 1001])
def test_wrong_numbers_of_steps_are_named(steps):
    with pytest.raises(InputError, match=f"{steps} sampling steps"):
        respace(linear_schedule(), steps)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("step", [1, 500, 999])
def test_a_right_prediction_says_data_and_noise(kind, step):
    """The less is left of what is asked for, the more digits float32 loses: 1e-7 / sqrt(4e-5)."""
    schedule, steps = linear_schedule(), jnp.full(2, step)
    x0, noise = (jax.random.normal(jax.random.key(i), (2, 3, 4)) for i in (0, 1))
    x = add_noise(schedule, x0, noise, steps)
    out = target(schedule, kind, x0, noise, steps)
    found, variance = split_output(schedule, kind, x, out, steps)
    assert variance is None
    np.testing.assert_allclose(found.x0, x0, atol=2e-4)
    np.testing.assert_allclose(found.eps, noise, atol=2e-4)


def test_wrong_predictions_are_named():
    x = jnp.zeros((1, 2))
    for call in (split_output, target):
        with pytest.raises(InputError, match="prediction is 'score'"):
            call(linear_schedule(), "score", x, x, jnp.zeros(1, jnp.int32))
