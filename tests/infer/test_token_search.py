"""Search by tokens beside a search without any cache, and what it asks of whom."""

import dataclasses

import jax
import jax.numpy as jnp
import models_for_tests
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.errors import InputError
from kvjax.infer.search.ledger import forward_flops
from kvjax.infer.search.token_models import Models, TokenOptions
from kvjax.infer.search.token_search import TokenSearch
from kvjax.infer.search.token_step import nucleus, pick
from kvjax.models.mrm import MRM
from kvjax.models.reward import TokenReward
from kvjax.safety_exact import nucleus as nucleus_by_hand

pytestmark = pytest.mark.slow

V, END = 24, 2
SIZES = dataclasses.replace(
    models_for_tests.CONFIG, vocab_size=V, num_layers=2, embed_dim=16, mlp_dim=24, num_heads=2,
    head_dim=8, windows=(), qkv_bias=False, max_positions=48,
)  # fmt: skip
SMALL = dataclasses.replace(SIZES, num_layers=1, num_kv_heads=1)
SEEN = np.arange(V) % 3 > 0
JUDGE = TokenReward(good=3, bad=4)


def build():
    policy = (*models_for_tests.random_decoder(SIZES, 0), SIZES)
    graph, params = models_for_tests.random_decoder(SMALL, 1)
    made = MRM(graph, SMALL)
    rated = made.init(params, 0)
    bias = jnp.asarray(np.random.default_rng(2).normal(size=V), jnp.float32)
    rated = {**rated, "head": {"bias": bias}}
    prm = (*models_for_tests.random_decoder(SMALL, 3), SMALL, JUDGE)
    return Models(policy=policy, mrm=(made, rated, SEEN), prm=prm, ends=(END,))


MODELS = build()
PROMPTS = [[1, 5, 9], [1, 5, 9, 7, 11], [20], [1, 5], [8, 8, 8]]
OPTIONS = TokenOptions(width=3, p=0.9, max_tokens=6, min_tokens=2)


class Dense:
    """The three models without a cache: each text runs whole, padded to one length."""

    def __init__(self, length=16):
        self.length = length
        graph, params, config = MODELS.policy
        self.policy = models_for_tests.dense_logits(graph, params, config)
        mrm, rated, _ = MODELS.mrm
        self.rated = models_for_tests.dense_logits(mrm.graph, rated["base"], SMALL)
        self.judge = models_for_tests.dense_logits(*MODELS.prm[:3])
        self.bias = np.asarray(rated["head"]["bias"])

    def last(self, model, text):
        padded = np.zeros((1, self.length), np.int32)
        padded[0, : len(text)] = text
        return np.asarray(model(padded))[0, len(text) - 1]

    def logprob(self, text, may_end):
        x = self.last(self.policy, text).astype(np.float64)
        if not may_end:
            x[END] = -np.inf
        return x - np.log(np.sum(np.exp(x - x.max()))) - x.max()

    def rewards(self, text):
        return self.last(self.rated, text) + self.bias

    def prm(self, text):
        x = self.last(self.judge, text)
        return x[JUDGE.good] - x[JUDGE.bad]


DENSE = Dense()


def beam(prompt, o, rate):
    """Equation 3 by hand: every edge of every open answer, the best N of them."""
    nodes, done = [((), [0.0])], []
    for step in range(o.max_tokens):
        edges = []
        for i, (answer, rewards) in enumerate(nodes):
            logprob = DENSE.logprob([*prompt, *answer], step >= o.min_tokens)
            inside = nucleus_by_hand(np.exp(logprob), o.p)
            for token in np.flatnonzero(inside & (SEEN | (np.arange(V) == END))):
                reward = rewards[-1] if token == END else rate(prompt, answer, token)
                edges.append((-reward, i, int(token), reward))
        kept = sorted(edges)[: o.width - len(done)]
        following = []
        for _, i, token, reward in kept:
            answer, rewards = nodes[i]
            if token == END:
                done.append((answer, [*rewards, reward]))
            else:
                following.append(((*answer, token), [*rewards, reward]))
        nodes = following
        if not nodes:
            break
    return done + nodes


@pytest.fixture(scope="module")
def saffron():
    return TokenSearch(MODELS, OPTIONS, prompts_at_a_time=3, prompt_tokens=5)


def test_saffron_is_the_papers_beam_step_and_the_answer_its_best(saffron):
    searched, options = saffron, OPTIONS
    found = searched.search(PROMPTS)
    for prompt, got in zip(PROMPTS, found, strict=True):
        rate = lambda p, a, t: DENSE.rewards([*p, *a])[t]  # noqa: E731
        answers = beam(prompt, options, rate)
        best = max(answers, key=lambda answer: answer[1][-1])
        assert got.tokens == best[0] and got.others == len(answers)
        # float32 of another order of summation.
        np.testing.assert_allclose(got.rewards, best[1][1:], atol=1e-5)
        assert got.score == got.rewards[-1]
    assert searched.trie.ledger.held == 0


def test_one_row_a_node_and_step_however_large_the_nucleus_is():
    """Property 1 of the dossier: after the prompts each open answer costs one row of each model."""
    for p in (0.2, 0.999):
        options = dataclasses.replace(OPTIONS, p=p, min_tokens=6)  # none ends
        searched = TokenSearch(MODELS, options, prompts_at_a_time=2, prompt_tokens=5)
        found = searched.search(PROMPTS[:2])
        costs = searched.ledger.models
        assert costs["mrm"].calls == 6 and costs["mrm"].rows == costs["policy"].rows
        most = 2 + 5 * 2 * options.width
        assert costs["mrm"].rows <= most and (p < 0.9 or costs["mrm"].rows == most)
        prompts = sum(map(len, PROMPTS[:2]))
        assert costs["mrm"].tokens == costs["mrm"].rows - 2 + prompts
        assert all(len(each.tokens) == 6 for each in found)


def prm_beam(prompt, o):
    """Children by their likelihood, K of a node; each judged as a whole text."""
    nodes = [((), 0.0)]
    for _ in range(o.max_tokens):
        edges = []
        for i, (answer, _) in enumerate(nodes):
            logprob = DENSE.logprob([*prompt, *answer], False)
            inside = np.flatnonzero(nucleus_by_hand(np.exp(logprob), o.p))
            for token in sorted(inside, key=lambda t: -logprob[t])[: o.children]:
                score = DENSE.prm([*prompt, *answer, token])
                edges.append((-(score + o.mix * logprob[token]), i, int(token), score))
        nodes = [((*nodes[i][0], t), s) for _, i, t, s in sorted(edges)[: o.width]]
    return max(nodes, key=lambda node: node[1])


def test_a_prm_judges_children_one_by_one_and_pays_for_its_suffix():
    suffix = 3
    options = dataclasses.replace(
        OPTIONS, method="prm-beam", suffix=suffix, max_tokens=4, min_tokens=4, p=0.99, children=2
    )
    searched = TokenSearch(MODELS, options, prompts_at_a_time=2, prompt_tokens=5)
    for prompt, got in zip(PROMPTS[:3], searched.search(PROMPTS[:3]), strict=True):
        tokens, score = prm_beam(prompt, options)
        assert got.tokens == tokens and got.score == pytest.approx(score, abs=1e-5)
    costs = searched.ledger.models
    nodes = costs["policy"].rows
    assert costs["prm"].rows == 3 + 2 * nodes
    prompts = sum(map(len, PROMPTS[:3]))
    assert costs["prm"].tokens == prompts + 2 * nodes * (1 + suffix)
    assert searched.trie.ledger.held == 0


def test_whole_answers_are_judged_by_the_prm_in_the_trie():
    options = dataclasses.replace(OPTIONS, method="best-of-n", width=4)
    searched = TokenSearch(MODELS, options, prompts_at_a_time=3, prompt_tokens=5)
    for prompt, got in zip(PROMPTS, searched.search(PROMPTS), strict=True):
        assert got.others == 4 and 2 <= len(got.tokens) <= 6
        assert got.score == pytest.approx(DENSE.prm([*prompt, *got.tokens]), abs=1e-5)
    again = searched.search(PROMPTS)
    assert again == searched.search(PROMPTS) != searched.search(PROMPTS, first=100)
    rescored = dataclasses.replace(OPTIONS, aggregate="prm")
    searched = TokenSearch(MODELS, rescored, prompts_at_a_time=3, prompt_tokens=5)
    for prompt, got in zip(PROMPTS[:2], searched.search(PROMPTS[:2]), strict=True):
        assert got.score == pytest.approx(DENSE.prm([*prompt, *got.tokens]), abs=1e-5)


@pytest.mark.parametrize("method", ["rejection", "deal", "args", "random", "shuffled", "none"])
def test_rivals_on_the_same_trie_and_ledger(method):
    options = dataclasses.replace(
        OPTIONS, method=method, width=1 if method in ("args", "none") else 3, look_ahead=2,
        children=2, mix=1.0 if method == "args" else 0.0, threshold=1e9, max_tokens=4,
    )  # fmt: skip
    searched = TokenSearch(MODELS, options, prompts_at_a_time=2, prompt_tokens=5)
    found = searched.search(PROMPTS[:2])
    assert all(each.tokens and max(each.tokens) < V for each in found)
    assert searched.trie.ledger.held == 0
    costs = searched.ledger.models
    wanted = {"rejection": {"policy", "prm"}, "deal": {"policy", "prm"}, "args": {"policy", "prm"},
              "shuffled": {"policy", "mrm"}}  # fmt: skip
    assert set(costs) == wanted.get(method, {"policy"})
    if method == "rejection":  # nothing is good enough: all draws are made
        assert [each.others for each in found] == [3, 3]
    if method == "args":
        o = dataclasses.replace(options, min_tokens=4)
        args = TokenSearch(MODELS, o, prompts_at_a_time=2, prompt_tokens=5).search(PROMPTS[:1])
        assert args[0].tokens == prm_beam(PROMPTS[0], o)[0]


def test_neither_the_other_prompts_nor_the_page_size_change_an_answer(saffron):
    eight = TokenSearch(
        MODELS, dataclasses.replace(OPTIONS, page_size=4), prompts_at_a_time=8, prompt_tokens=8
    )
    for a, b in zip(saffron.search(PROMPTS), eight.search(PROMPTS), strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.rewards, b.rewards, atol=1e-5)


def test_with_one_token_a_page_the_cache_holds_the_distinct_prefixes():
    options = dataclasses.replace(OPTIONS, max_tokens=1)
    searched = TokenSearch(MODELS, options, prompts_at_a_time=2, prompt_tokens=5)
    searched.search(PROMPTS[:2])  # the second begins as the first does
    page = searched.programs.cache_config("mrm", 1, 1).page_bytes("cpu")
    assert page == 2 * 1 * 1 * 8 * 4
    assert searched.ledger.models["mrm"].kv_bytes == page * (5 + 2 * 3)


probabilities = st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any)


@settings(max_examples=200, deadline=None)
@given(probabilities, st.sampled_from([0.2, 0.5, 0.8, 0.95]))
def test_the_nucleus_is_equation_2(weights, p):
    weights = [*weights, *([0] * (12 - len(weights)))]
    chance = np.asarray(weights, np.float64) / sum(weights)
    with np.errstate(divide="ignore"):
        got = np.asarray(nucleus(jnp.asarray(np.log(chance), jnp.float32), p))
    for token in range(12):
        before = chance[chance > chance[token]].sum()
        if abs(before - p) > 1e-6:
            assert got[token] == (before < p and chance[token] > 0)
    assert got[int(np.argmax(chance))]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_unseen_token_is_taken_while_a_seen_one_is_there(seed):
    rng = np.random.default_rng(seed)
    logprob = jax.nn.log_softmax(jnp.asarray(rng.normal(0, 2, (2, 3, V)), jnp.float32))
    reward = jnp.asarray(rng.normal(size=(2, 3, V)), jnp.float32)
    seen, live = rng.random(V) < 0.3, rng.random((2, 3)) < 0.8
    ends = np.arange(V) == END
    found = pick(
        logprob, reward, jnp.asarray(seen), jnp.asarray(ends), jnp.zeros((2, 3)),
        jnp.asarray(live), p=0.8, width=4, mix=0.0, may_end=jnp.asarray(True),
    )  # fmt: skip
    inside = nucleus_by_hand(np.exp(np.asarray(logprob, np.float64)), 0.8) & live[..., None]
    for b in range(2):
        there = np.asarray(found.score[b]) > -np.inf
        tokens = np.asarray(found.token[b])[there]
        candidates = int((inside[b] & (seen | ends)).sum())
        if candidates:
            assert there.sum() == min(4, candidates) and (seen | ends)[tokens].all()
        else:  # the likeliest of the nuclei
            assert there.sum() == min(4, int(inside[b].sum()))
        assert live[b][np.asarray(found.node[b])[there]].all()


@pytest.mark.parametrize("layers,embed,heads", [(2, 64, 4), (1, 96, 3), (3, 32, 2)])
def test_counted_flops_are_xlas_to_5_percent(layers, embed, heads):
    config = dataclasses.replace(
        SIZES, num_layers=layers, embed_dim=embed, mlp_dim=3 * embed, num_heads=heads,
        num_kv_heads=heads, head_dim=32, vocab_size=512,
    )  # fmt: skip
    graph, params = models_for_tests.random_decoder(config)
    logits = models_for_tests.dense_logits(graph, params, config)
    t = 32
    cost = logits.lower(np.zeros((1, t), np.int32)).compile().cost_analysis()
    # XLA counts a loop's body once, and the whole square of the attention.
    one = dataclasses.replace(config, num_layers=1)
    counted = forward_flops(one, t, t * t, t * 512)
    assert counted == pytest.approx(cost["flops"], rel=0.05)
    doubled = forward_flops(dataclasses.replace(config, num_layers=2 * layers), t, t * t, 0)
    assert doubled == 2 * forward_flops(config, t, t * t, 0)


def test_what_cannot_be_searched_is_said_in_one_line():
    for wrong, message in (
        ({"method": "mcts"}, "no method"), ({"p": 0.0}, "nucleus"), ({"width": 0}, "width is 0"),
        ({"aggregate": "sum"}, "no aggregate"), ({"suffix": -1}, "0 or more"),
        ({"method": "args", "page_size": 4}, "page_size 1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            dataclasses.replace(OPTIONS, **wrong)
    only = dataclasses.replace(MODELS, mrm=None, prm=None)
    with pytest.raises(InputError, match="asks a mrm"):
        TokenSearch(only, OPTIONS, prompt_tokens=5)
    with pytest.raises(InputError, match="asks a prm"):
        TokenSearch(only, dataclasses.replace(OPTIONS, method="best-of-n"), prompt_tokens=5)
    with pytest.raises(InputError, match="one tokenizer"):
        dataclasses.replace(MODELS, mrm=(
            MODELS.mrm[0], MODELS.mrm[1], SEEN), policy=(
            *MODELS.policy[:2], dataclasses.replace(SIZES, vocab_size=25)))  # fmt: skip
    with pytest.raises(InputError, match="were made for 48"):
        TokenSearch(MODELS, OPTIONS, prompt_tokens=48)
    searched = TokenSearch(MODELS, OPTIONS, prompt_tokens=5, num_pages=6, prompts_at_a_time=2)
    with pytest.raises(InputError, match="fewer prompts at a time"):
        searched.search(PROMPTS[:2])
    for prompt, message in (([], "has 0 tokens"), ([1, V], "vocabulary of 24")):
        with pytest.raises(InputError, match=message):
            searched.search([prompt])
