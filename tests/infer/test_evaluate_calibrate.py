"""Calibration: the heads that find things get the budget; values tell what will be looked at."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.configs.task_prompts import make_prompts
from kvjax.infer.evaluate import Model, arrays
from kvjax.infer.evaluate_calibrate import calibrate_shares
from kvjax.infer.evaluate_foresight import calibrate_foresight
from kvjax.infer.evaluate_programs import Sizes, prefill
from kvjax.select import View, WindowKV

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return Model.load("tiny")


def test_shares_make_the_answers_likelier(model):
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


def test_foresight_tells_the_tokens_that_a_chain_of_facts_is_followed_by(model):
    """The words after a name are looked for at every hop, the name itself is not (layer 2)."""
    prompts = list(make_prompts(model.tokenizer, "tracking", 256, 11, 6))
    foresight = calibrate_foresight(model, [prompts[:4]])
    weights = np.asarray(foresight)[2, 0]
    sizes = Sizes(rows=2, prompt=256, question=0, answer=1, page_size=4, observed=1)
    batch = arrays(model, sizes, prompts[4:], "A")
    filled = prefill(model.graph, sizes, model.params, batch.tokens, batch.length)
    view = View(pool=filled.pool, table=filled.table, seen=filled.seen)
    values = np.asarray(view.values(jnp.int32(2)))[0]  # of prompts that were not fitted
    scores = values @ weights[:-1] + weights[-1]
    words = np.asarray([[model.tokenizer.decode([t]) for t in row] for row in batch.tokens])
    of = {word: scores[:, :256][words == word].mean() for word in (" follows", " red", " old")}
    assert of[" follows"] > max(of[" red"], of[" old"])
