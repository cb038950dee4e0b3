"""Calibration: the heads that find things get the budget."""

import numpy as np
import pytest

from kvjax.configs.task_prompts import make_prompts
from kvjax.infer.evaluate import Model
from kvjax.infer.evaluate_calibrate import calibrate_shares
from kvjax.select import WindowKV

pytestmark = pytest.mark.slow


def test_shares_make_the_answers_likelier():
    model = Model.load("tiny")
    prompts = list(make_prompts(model.tokenizer, "multi_query", 256, 11, 4))
    losses = []
    shares = calibrate_shares(
        model, prompts, WindowKV(window=4, alpha=8), (0.15,), steps=(8.0,),
        progress=lambda tried, loss, shares: losses.append(loss),
    )  # fmt: skip
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]
    found = np.asarray(shares)
    assert found.shape == (8, 2)
    assert found.mean() == pytest.approx(1, abs=1e-2)
    # This head of the built-in model is the one without which nothing is found.
    assert np.unravel_index(found.argmax(), found.shape) == (2, 0)
