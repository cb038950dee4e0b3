"""Scores of given texts, against a dense recompute."""

import models_for_tests
import numpy as np
import pytest
from scipy.special import log_softmax

from kvjax.errors import InputError
from kvjax.infer.scores import join


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models_for_tests.save_model(folder)
    return models_for_tests.lean_llm(folder)


def dense(prompt, continuation):
    """Log-probabilities of the continuation's tokens: softmax of the logits one place before."""
    logits = models_for_tests.dense_logits(*models_for_tests.random_decoder())
    tokens = np.array([[*prompt, *continuation]], np.int32)
    rows = log_softmax(np.asarray(logits(tokens))[0], axis=-1)
    places = range(len(prompt), tokens.shape[1])
    return [rows[place - 1, tokens[0, place]] for place in places]


def test_scores_are_those_of_a_dense_recompute(llm):
    """Prompts of more than one chunk, continuations of one token and of many; float32, so 1e-4."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, n).tolist() for n in (1, 70, 9)]
    rests = [rng.integers(0, 256, n).tolist() for n in (90, 1, 13)]
    for prompt, rest, score in zip(prompts, rests, llm.score(prompts, rests), strict=True):
        assert score.token_ids == tuple(rest)
        assert score.token_logprobs == pytest.approx(dense(prompt, rest), abs=1e-4)
        assert score.logprob == pytest.approx(sum(score.token_logprobs))


def test_a_shared_prompt_is_computed_once(llm):
    """Four continuations of 41 tokens: three find ten pages of four and compute the rest."""
    planner = llm.engine.planner
    prompt = [7] * 41
    before = planner.prefill_tokens_computed
    llm.score([prompt] * 4, [[i, i + 1, i + 2] for i in range(4)])
    assert planner.prefill_tokens_computed - before == 44 + 3 * 4
    assert planner.ledger.held == 0 and not planner.busy


def test_texts_are_split_as_one(llm):
    tokenizer = llm.tokenizer
    assert join(tokenizer, "some", " text") == (tokenizer.encode("some text"), 4)
    chat = [{"role": "user", "content": "hi"}]
    assert join(tokenizer, chat, "yes") == (tokenizer.encode("user: hi\nyes"), 9)
    assert join(tokenizer, "ab", [1, 2]) == ([*tokenizer.encode("ab"), 1, 2], 2)
    assert join(tokenizer, [1, 2, 3], "c") == ([1, 2, 3, *tokenizer.encode("c")], 3)
    assert join(None, [1], [2]) == ([1, 2], 1)
    # One character of two tokens, of which neither is the prompt's.
    assert join(tokenizer, "a", "ä") == (tokenizer.encode("aä"), 1)


@pytest.mark.parametrize(
    ("prompt", "rest", "said"),
    [
        ("", "x", "the prompt is empty"),
        ("x", "", "the continuation is empty"),
        ([], [1], "the prompt is empty"),
        ([1], [], "the continuation is empty"),
        ([1], [999], "outside of"),
        ([1], [1] * 256, "257 tokens"),
    ],
)
def test_what_cannot_be_scored_is_said(llm, prompt, rest, said):
    with pytest.raises(InputError, match=said):
        llm.score([prompt], [rest])


def test_text_needs_a_tokenizer():
    for prompt, rest in (("x", [1]), ([1], "x"), ([{"role": "user", "content": "x"}], [1])):
        with pytest.raises(InputError, match=r"no tokenizer\.json"):
            join(None, prompt, rest)


def test_pairs_are_wanted(llm):
    with pytest.raises(InputError, match="2 prompts for 1"):
        llm.score(["a", "b"], ["c"])
