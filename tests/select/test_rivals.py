"""What every policy promises, whatever it looks at."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from select_views import keep_of, kept_by, make_view, random_arrays

from kvjax.models import Rope
from kvjax.select import (
    H2O,
    TOVA,
    AdaKV,
    ChunkKV,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    Oracle,
    PyramidKV,
    RandomTokens,
    RandomWindows,
    SnapKV,
    StreamingLLM,
)

POLICIES = [
    StreamingLLM(), H2O(), TOVA(), Knorm(), KeyDiff(), ExpectedAttention(future=8),
    SnapKV(last=4), SnapKV(last=4, kernel=7, pooling="max"), ChunkKV(chunk=8, last=4),
    ChunkKV(chunk=4, last=4, reuse=2), PyramidKV(last=4), PyramidKV(last=4, fallback=False),
    AdaKV(scorer=SnapKV(last=4)), AdaKV(scorer=Knorm(), floor=0.0), RandomTokens(),
    RandomWindows(), Oracle(),
]  # fmt: skip
each = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)


def view_of(rows, lengths, pick=slice(None)):
    q, k, v = (x[:, pick] for x in random_arrays(layers=4, rows=rows, tokens=48))
    number = np.arange(10, 10 + rows, dtype=np.int32)[pick]
    needles = np.zeros((len(number), 48), bool)
    needles[:, 20:24] = True
    return make_view(
        q, k, v, lengths=np.asarray(lengths)[pick], number=jnp.asarray(number),
        needles=jnp.asarray(needles),
        inverse_frequencies=jnp.asarray(Rope().inverse_frequencies(16)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def view():
    return view_of(2, [48, 37])


@each
def test_the_budget_is_kept_in_pages(view, policy):
    for count in (12, 24, 36):
        keep = np.asarray(kept_by(policy, view, count))
        held = np.ceil(keep.sum(-1) / 4) * 4
        assert held.mean((0, 1)).max() <= count
        assert held.mean((0, 1)).min() > count - 9  # at most a chunk or two pages are left over
        assert not keep[:, :, 1, 37:].any()


@each
def test_the_whole_budget_keeps_everything(view, policy):
    keep = keep_of(policy, view, jnp.asarray([48, 37], jnp.int32))
    assert bool(jnp.all(keep == view.live))


@each
def test_a_row_does_not_depend_on_its_batch(view, policy):
    both = np.asarray(kept_by(policy, view, 16))
    for row in range(2):
        alone = view_of(2, [48, 37], slice(row, row + 1))
        assert np.array_equal(np.asarray(kept_by(policy, alone, 16))[:, :, 0], both[:, :, row])


def test_the_ends_stay(view):
    keep = np.asarray(kept_by(StreamingLLM(), view, 16))
    assert np.flatnonzero(keep[0, 0, 0]).tolist() == [*range(4), *range(36, 48)]
    keep = np.asarray(kept_by(SnapKV(last=4), view, 16))
    assert keep[:, :, 0, 44:].all()
    assert keep[:, :, 1, 33:37].all()


def test_chance_is_another_for_each_layer_row_and_seed(view):
    keep = np.asarray(kept_by(RandomTokens(), view, 24))
    assert not np.array_equal(keep[0], keep[1])
    other = np.asarray(kept_by(dataclasses.replace(RandomTokens(), seed=1), view, 24))
    assert not np.array_equal(keep, other)
    assert np.array_equal(keep, np.asarray(kept_by(RandomTokens(), view, 24)))


def test_the_oracle_keeps_the_needles(view):
    assert bool(jnp.all(kept_by(Oracle(last=4), view, 12)[..., 20:24]))


def test_heads_that_need_more_get_more():
    q, k, v = random_arrays(layers=1, rows=1, tokens=48, sharp=0.1)
    k[:, :, 8:32, 0] = 400 * q[:, :, -1:, 0]  # one head attends to 24 tokens, the other nowhere
    keep = np.asarray(kept_by(AdaKV(scorer=SnapKV(last=4, kernel=1)), make_view(q, k, v), 16))
    first, second = keep[0, :, 0].sum(-1)
    assert first > second
    assert first + second == 32
