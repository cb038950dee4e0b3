"""What parties compute on shares is the right thing in the clear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.infer.private import arithmetic as a
from kvjax.infer.private.attention import OURS, Choice, attend, attend_chosen, choose
from kvjax.infer.private.attention import representatives as vectors_of
from kvjax.infer.private.model import POLICIES

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 5, 8]), st.data())
def test_ranks_are_a_stable_sort(n, data):
    row = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=n, max_size=n))
    order = np.argsort(-np.asarray(row), kind="stable")
    found = a.ranks(jnp.asarray([row], jnp.float32))[0]
    np.testing.assert_array_equal(np.asarray(found)[order], np.arange(n))


def test_top_k_rows_are_one_hot_and_ties_go_to_the_first():
    scores = jnp.asarray([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]], jnp.float32)
    chosen = np.asarray(a.rank_top_k(scores, 2))
    np.testing.assert_array_equal(chosen.argmax(-1), [[1, 2], [0, 1]])
    np.testing.assert_array_equal(chosen.sum(-1), 1)
    np.testing.assert_array_equal(
        np.asarray(a.engine_top_k(scores[:1], 2)).sum(1), chosen[:1].sum(1)
    )


@pytest.mark.parametrize(("n", "kept"), [(40, 1), (40, 33), (40, 40), (70, 65)])
def test_compaction_keeps_the_largest_in_their_order(n, kept):
    scores = RANDOM.permutation(n).astype(np.float32)
    stay = np.sort(np.argsort(-scores)[:kept])
    np.testing.assert_array_equal(
        np.asarray(a.keep_top(jnp.asarray(scores), kept)), np.eye(n, dtype=np.int32)[stay]
    )


def test_silu_softmax_and_folded_products():
    x = jnp.linspace(-20.0, 20.0, 99)
    np.testing.assert_allclose(a.silu(x), jax.nn.silu(x), atol=2e-5)
    scores = 3 * normal(4, 16)
    weights, inverse = a.softmax_parts(scores)
    found = np.asarray(weights) * np.asarray(inverse)
    np.testing.assert_allclose(found, jax.nn.softmax(scores), atol=2e-6)
    q, k = normal(8, 3, 5), normal(8, 5, 6)
    wide = a.fold_queries(q, 4) @ k.reshape(2, 20, 6)
    np.testing.assert_allclose(wide.reshape(8, 3, 6), q @ k, atol=1e-5)


@pytest.mark.parametrize("gather", ["kv", "scores"])
@pytest.mark.parametrize("fold", [1, 4])
def test_all_clusters_are_full_attention(gather, fold):
    q, k, v = normal(4, 8), normal(4, 64, 8), normal(4, 64, 8)
    tail = normal(4, 3, 8), normal(4, 3, 8), jnp.asarray([True, True, False])
    choice = Choice(clusters=4, gather=gather, fold=fold)
    chosen = choose(q, vectors_of(k, 16, 0.6), choice)
    keys = jnp.concatenate([k, tail[0][:, :2]], axis=1)
    values = jnp.concatenate([v, tail[1][:, :2]], axis=1)
    full = attend(q, keys, values)
    weights = jax.nn.softmax(jnp.einsum("hd,hnd->hn", q, keys))
    np.testing.assert_allclose(full, jnp.einsum("hn,hnd->hd", weights, values), atol=2e-5)
    np.testing.assert_allclose(attend_chosen(q, k, v, chosen, choice, tail), full, atol=2e-5)
    np.testing.assert_allclose(attend(q, k, v, tail=tail), full, atol=2e-5)


def test_both_ways_to_gather_agree_on_few_clusters():
    q, k, v = normal(4, 8), normal(4, 64, 8), normal(4, 64, 8)
    few = Choice(clusters=2, fold=1)
    chosen = choose(q, vectors_of(k, 16, 0.6), few)
    by_scores = attend_chosen(q, k, v, chosen, few)
    by_kv = attend_chosen(q, k, v, chosen, Choice(clusters=2, fold=1, gather="kv"))
    np.testing.assert_allclose(by_scores, by_kv, atol=1e-5)


def test_policies_count_whole_clusters_and_share_in_pairs():
    ours = POLICIES["ours"]
    assert ours.kept(256) == 112 and ours.chosen(256) == Choice(clusters=1)
    assert ours.chosen(1024) == Choice(clusters=3, fold=OURS.fold)
    assert ours.kept(8) == 4 and ours.chosen(8) is None and ours.chosen(20) is None
    assert POLICIES["full"].kept(100) == 100 and POLICIES["static"].kept(100) == 40
    alone = [layer for layer in range(32) if ours.selects(layer, 32)]
    assert alone == [0, 1, *range(2, 30, 2), 30, 31]
