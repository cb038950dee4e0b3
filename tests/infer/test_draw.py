"""Sampling on the device against what its rules say, in numpy and float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.infer import SamplingParams
from kvjax.infer.draw import RowSettings, draw, logprobs_of, settings_of

VOCABULARY, LENGTH = 23, 12


def rows(*params, stop_ids=(), prompt=4):
    filled = RowSettings.empty(len(params))
    for row, p in enumerate(params):
        settings_of(filled, row, p, frozenset(stop_ids), prompt)
    return jax.tree.map(jnp.asarray, filled)


@jax.jit
def drawn(logits, settings, history, position):
    return draw(logits, settings, history, position)


def distribution(logits, p, history, position, stop_ids=(), prompt=4):
    """The probabilities of the next token, as SamplingParams describes them."""
    x = logits.astype(np.float64).copy()
    for token, bias in p.logit_bias.items():
        x[token] += bias
    if position < prompt + p.min_tokens:
        x[list(stop_ids)] = -np.inf
    seen, answer = set(history[:position]), list(history[prompt:position])
    for token in range(len(x)):
        if token in seen:
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else (
                x[token] * p.repetition_penalty
            )  # fmt: skip
        x[token] -= p.frequency_penalty * answer.count(token)
        x[token] -= p.presence_penalty * (token in answer)
    if p.temperature == 0:
        return (np.arange(len(x)) == np.argmax(x)).astype(float)
    x = x / p.temperature
    probability = np.exp(x - x.max())
    keep = (x >= x.max() + np.log(p.min_p)) if p.min_p else np.ones(len(x), bool)
    order = np.argsort(-x, kind="stable")
    if p.top_k:
        keep &= x >= x[[i for i in order if keep[i]]][: p.top_k][-1]
    probability = np.where(keep, probability, 0)
    probability /= probability.sum()
    if p.top_p < 1:
        before = np.cumsum(probability[order]) - probability[order]
        probability[order[before >= p.top_p]] = 0
    return probability / probability.sum()


tokens = st.integers(0, VOCABULARY - 1)
options = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.8, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.3]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 2.0]), max_size=3),
    min_tokens=st.integers(0, 8),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(options, min_size=3, max_size=3), st.integers(0, 999), st.integers(4, LENGTH))
def test_no_row_draws_what_its_rules_exclude(params, seed, position):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (3, VOCABULARY)).astype(np.float32)
    history = rng.integers(0, VOCABULARY, (3, LENGTH)).astype(np.int32)
    stop = (2, 3)
    where = np.full(3, position, np.int32)
    got = drawn(logits, rows(*params, stop_ids=stop), history, where)
    for i, p in enumerate(params):
        probability = distribution(logits[i], p, history[i], position, stop)
        assert probability[int(got[i])] > 0, p


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.2, repetition_penalty=1.3, presence_penalty=0.5),
        SamplingParams(temperature=1.0, frequency_penalty=0.7, logit_bias={3: 1.5, 4: -100.0}),
    ],
)
def test_draws_follow_the_distribution(p):
    """4096 seeds: the counts are within 5 standard deviations of what is expected."""
    n, rng = 4096, np.random.default_rng(0)
    logits = rng.normal(0, 1.5, VOCABULARY).astype(np.float32)
    history = rng.integers(0, VOCABULARY, LENGTH).astype(np.int32)
    settings = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), rows(p))
    settings = dataclasses.replace(settings, seed=jnp.arange(n, dtype=jnp.uint32))
    got = drawn(
        jnp.tile(logits, (n, 1)), settings, jnp.tile(history, (n, 1)), jnp.full(n, 9, jnp.int32)
    )
    expected = distribution(logits, p, history, 9)
    counts = np.bincount(got, minlength=VOCABULARY)
    spread = np.sqrt(n * expected * (1 - expected)) + 1e-9
    assert np.all(np.abs(counts - n * expected) <= 5 * spread)


def test_a_row_without_settings_takes_the_likeliest_token():
    logits = np.random.default_rng(0).normal(0, 1, (4, VOCABULARY)).astype(np.float32)
    empty = jax.tree.map(jnp.asarray, RowSettings.empty(4))
    history = jnp.zeros((4, LENGTH), jnp.int32)
    got = drawn(logits, empty, history, jnp.full(4, 5, jnp.int32))
    np.testing.assert_array_equal(got, logits.argmax(1))


def test_log_probabilities_and_the_likeliest():
    logits = np.random.default_rng(0).normal(0, 3, (5, VOCABULARY)).astype(np.float32)
    chosen = np.array([0, 1, 22, 3, -1], np.int32)
    got = logprobs_of(jnp.asarray(logits), jnp.asarray(chosen))
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    # float32 sums of 23 terms: a few units in the last place of numbers near 10.
    np.testing.assert_allclose(got.chosen[:4], exact[np.arange(4), chosen[:4]], atol=1e-5)
    np.testing.assert_array_equal(got.top_token, np.argsort(-exact, axis=1)[:, :20])
    np.testing.assert_allclose(got.top, -np.sort(-exact, axis=1)[:, :20], atol=1e-5)


def test_a_vocabulary_of_fewer_than_20_has_no_more_to_offer():
    got = logprobs_of(jnp.zeros((1, 3)), jnp.zeros(1, jnp.int32))
    np.testing.assert_array_equal(got.top_token[0], [0, 1, 2] + [-1] * 17)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"frequency_penalty": float("nan")},
        {"n": 0},
        {"stop": "text"},
        {"stop": ("",)},
        {"logprobs": 21},
        {"min_tokens": 9, "max_tokens": 8},
        {"logit_bias": {1: float("inf")}},
        {"logit_bias": dict.fromkeys(range(301), 1.0)},
    ],
    ids=str,
)
def test_sampling_parameters_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SamplingParams(**options)
