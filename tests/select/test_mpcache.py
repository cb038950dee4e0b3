"""MPCache: what stays, what a step reads of it, and what the released code keeps and reads."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from select_views import attention, kept_by, make_view, random_arrays, slots

from kvjax.cache import advance, slots_of
from kvjax.errors import InputError
from kvjax.models.attention import paged_attend, reading_attend
from kvjax.pallas_kernels.page_attention import Items, WorkList
from kvjax.pallas_kernels.page_bounds import rebuild_bounds
from kvjax.select import MPCache, Read, calibrate_sharing, evict, published_sharing

GOLDEN = np.load(Path(__file__).parent / "golden" / "mpcache.npz")
CASES = json.loads(str(GOLDEN["about"]))["cases"]
THRESHOLDS = {"hotpotqa": 1e-8, "narrativeqa": 1e-3, "triviaqa": 1e-4, "qasper": 1e-8,
              "gov_report": 1e-20}  # fmt: skip
N, SIZE = 37, 4


def with_bounds(view):
    bounds = rebuild_bounds(view.pool.k, None, view.table.pages, view.table.length)
    return dataclasses.replace(view, pool=dataclasses.replace(view.pool, bounds=bounds))


@functools.partial(jax.jit, static_argnums=0)
def choose(policy, view, layer, tokens):
    q = view.seen.q[layer, :, -1]
    table = view.table
    return policy.choose(q, view.pool, layer, table.pages, table.length, tokens)


def chosen(policy, view, tokens, layer=0):
    """bool[K/C, B, M], for the last query of each row."""
    tokens = jnp.full((view.shape[2],), tokens, jnp.int32)
    return np.asarray(choose(policy, view, jnp.int32(layer), tokens))


@pytest.fixture(scope="module")
def view():
    return with_bounds(make_view(*random_arrays(layers=4), spare=1))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_keeps_and_reads_what_the_released_code_does(number):
    _, data, rest = CASES[number]
    q, k = (GOLDEN[f"{number}/{name}"].astype(np.float32)[None, None] for name in "qk")
    kept, read = GOLDEN[f"{number}/kept"], GOLDEN[f"{number}/read"]
    policy = MPCache(mode="threshold", threshold=THRESHOLDS[data], extra=True)
    prompt = make_view(q[:, :, :-1], k[:, :, :-1], k[:, :, :-1], page_size=16)
    assert slots(kept_by(policy, prompt, 16))[0][0][0] == kept.tolist()

    left = [*kept.tolist(), q.shape[2] - 1]  # and the new token
    after = with_bounds(make_view(q[:, :, left], k[:, :, left], k[:, :, left], page_size=16))
    clusters = -(-len(left) // 16)
    ours = chosen(policy, after, int(clusters * 0.2) * 16)[:, 0]
    whole = np.pad(read, [(0, 0), (0, clusters * 16 - len(left))], constant_values=True)
    theirs = whole.reshape(len(read), clusters, 16).all(-1)
    if rest == 0:
        assert np.array_equal(ours, theirs)
        return
    # It fills the last cluster up with earlier tokens and counts their keys too, so that it may
    # score the last cluster higher or lower than its own keys do, and choose it or another.
    assert (np.sum(ours != theirs, axis=1) <= 1).all()
    assert theirs[:, [0, -1]].all() and ours[:, [0, -1]].all()


@pytest.mark.parametrize("heads", ["shared", "each"])
def test_a_public_number_of_tokens_stays_those_attended_to_most(view, heads):
    keep = np.asarray(kept_by(MPCache(heads=heads, last=0), view, 4))
    assert (keep.sum(-1) == -(-N * 4 // 10)).all()
    weights = attention(*random_arrays(layers=4)[:2])[0][:, :, :, -int(0.2 * N) :].sum(3)
    received = np.moveaxis(weights, 1, 2).reshape(4, 2, 2, 2, N).mean(2)  # [L, K, B, n]
    if heads == "shared":
        received = np.broadcast_to(received.mean(1, keepdims=True), received.shape)
        assert (keep == keep[:, :1]).all()
    for place in np.ndindex(4, 2, 2):
        best = np.argsort(-received[place], kind="stable")[: keep[place].sum()]
        assert np.flatnonzero(keep[place]).tolist() == sorted(best.tolist())


def test_no_less_stays_than_a_step_reads_and_the_last_tokens_do(view):
    keep = np.asarray(kept_by(MPCache(static=0.1), view, 30))
    assert (keep.sum(-1) == 30).all()
    assert keep[..., N - 8 : N].all()
    assert np.asarray(kept_by(MPCache(), view, 64))[..., :N].all()


def test_threshold_is_of_the_softmax_without_scale_and_mask():
    q, k, v = random_arrays(tokens=64, layers=1, rows=1, sharp=1.0)
    keep = np.asarray(kept_by(MPCache(mode="threshold", threshold=0.05), make_view(q, k, v), 4))
    score = np.einsum("qhd,shd->hqs", q[0, 0, -12:], np.repeat(k[0, 0], 2, axis=1))
    weight = np.exp(score - score.max(-1, keepdims=True))
    mean = (weight / weight.sum(-1, keepdims=True)).mean(0)  # over the heads
    expected = (mean >= 0.05).any(0)
    assert 8 < expected.sum() < 56
    assert np.array_equal(keep[0, :, 0], np.stack([expected, expected]))


@pytest.mark.parametrize("rep", ["linear_minmax", "mean", "exact_bound"])
@pytest.mark.parametrize("fan", [1, 2])
def test_reads_a_fixed_number_of_pages_the_first_and_the_last_among_them(view, rep, fan):
    policy = MPCache(rep=rep, fan=fan)
    for tokens in (1, 8, 16, 36, 99):
        pages = chosen(policy, view, tokens)
        used = -(-N // SIZE)
        assert (pages.sum(-1) == min(max(1, tokens // SIZE), used)).all()
        assert pages[..., used - 1].all()
        assert pages[..., 0].all() or tokens < 8
        assert not pages[..., used:].any()


def test_a_cluster_that_the_query_is_like_is_read():
    q, k, v = random_arrays(layers=1, sharp=1.0)
    k[:, :, 20:24] = 3 * q[:, :, -1:, ::2]  # each KV head's first query head
    view = with_bounds(make_view(q, k, v))
    for rep in ("linear_minmax", "mean", "exact_bound"):
        assert chosen(MPCache(rep=rep), view, 12)[..., 5].all()


def test_quest_reads_the_largest_bounds(view):
    pages = chosen(MPCache(static=1.0, rep="exact_bound", fan=1), view, 20)
    _, k, _ = random_arrays(layers=4)
    q = random_arrays(layers=4)[0][0, :, -1]  # [B, H, D]
    for row in range(2):
        for head in range(2):
            own = [k[0, row, i : i + SIZE, head] for i in range(0, N, SIZE)]
            corner = [[np.maximum(q[row, h] * x.max(0), q[row, h] * x.min(0)).sum() for x in own]
                      for h in (2 * head, 2 * head + 1)]  # fmt: skip
            score = np.asarray(corner) * 16**-0.5
            weight = (np.exp(score) / np.exp(score).sum(1, keepdims=True)).sum(0)
            weight[[0, -1]] = np.inf
            best = np.argsort(-weight, kind="stable")[:5]
            assert np.flatnonzero(pages[head, row]).tolist() == sorted(best.tolist())


@functools.partial(jax.jit, static_argnums=0)
def step(policy, view, q, k, v, tokens):
    """One token more for each row: outputs [L, B, H, D] and what the layers read."""
    table, rows = view.table, jnp.arange(2, dtype=jnp.int32)
    put = slots_of(table, rows, table.position, SIZE)
    pool = view.pool
    number, pages = rows, table.pages.shape[-1]
    width = pages if policy is None else min(pages, policy.width(64, SIZE))
    index = jnp.stack([number, 0 * number, 0 * number + width, number, number + 1], axis=1)
    work = WorkList(
        items=(Items(index=index, count=jnp.int32(2), max_queries=1, max_pages=width),),
        pages=table.pages, length=advance(table, rows).length, query_position=table.position,
    )  # fmt: skip
    pool = dataclasses.replace(
        pool, position=pool.position.at[put.page, put.offset].set(N, mode="drop")
    )
    heads = table.pages.shape[1]
    read = Read(jnp.zeros((heads, 2, width), jnp.int32), jnp.zeros((heads, 2), jnp.int32))
    attend = paged_attend(put, work)
    if policy is not None:
        attend = reading_attend(put, work, policy, tokens)

    def one(state, layer):
        number, *new = layer
        out, state = attend(number, *new, state)
        return state, (out, read if policy is None else state[1])

    layers = jnp.arange(4, dtype=jnp.int32), q, k, v
    return jax.lax.scan(one, pool if policy is None else (pool, read), layers)[1]


def test_reading_all_is_full_attention_and_followers_read_what_leaders_do(view):
    rng = np.random.default_rng(5)
    q = rng.normal(size=(4, 2, 4, 16)).astype(np.float32)
    k, v = rng.normal(size=(2, 4, 2, 2, 16)).astype(np.float32)
    new = [jnp.asarray(x) for x in (q, k, v)]
    full, _ = step(None, view, *new, None)
    all_of_it = jnp.full((2,), 64, jnp.int32)
    out, _ = step(MPCache(), view, *new, all_of_it)
    np.testing.assert_allclose(out, full, atol=1e-5)

    some = jnp.full((2,), 12, jnp.int32)
    shared, reads = step(MPCache(leaders=(0, 0, 2, 2)), view, *new, some)
    alone, own = step(MPCache(), view, *new, some)
    assert not np.allclose(alone, full, atol=1e-3)
    for layer in (0, 2):
        assert np.array_equal(reads.entry[layer], reads.entry[layer + 1])
        assert np.array_equal(reads.entry[layer], own.entry[layer])
        np.testing.assert_allclose(shared[layer], alone[layer], atol=1e-6)
    assert (np.asarray(reads.length) == 10).all()  # two whole pages and the last one's 2 tokens


def test_what_is_read_after_an_eviction_is_what_stayed(view):
    keep = kept_by(MPCache(), view, 8)
    left = evict(view.pool, view.table, keep)
    after = with_bounds(dataclasses.replace(view, pool=left.pool, table=left.table))
    assert (np.asarray(after.table.length) == 15).all()
    assert (chosen(MPCache(), after, 64).sum(-1) == 4).all()


def test_leaders():
    leaders = published_sharing(32)
    assert [i for i in range(32) if leaders[i] == i] == [0, 1, *range(2, 30, 2), 30, 31]
    assert all(leaders[i] == i - 1 for i in range(3, 30, 2))
    q, k, v = random_arrays(layers=4)
    q[1], k[1] = q[0], k[0]
    view = with_bounds(make_view(q, k, v))
    tokens = jnp.full((2,), 16, jnp.int32)
    assert calibrate_sharing(view, MPCache(), tokens, least=0.95) == (0, 0, 2, 3)
    assert calibrate_sharing(view, MPCache(), tokens, least=0.0) == (0, 0, 0, 0)
    kept = np.asarray(kept_by(MPCache(leaders=(0, 0, 2, 2)), view, 8))
    assert np.array_equal(kept[2], kept[3])
    assert not np.array_equal(kept[1], kept[3])


@pytest.mark.parametrize(
    "options, message",
    [({"rep": "best"}, "linear_minmax"), ({"static": 0.0}, "above 0"), ({"fan": 0}, "one page"),
     ({"mode": "rank"}, "threshold"), ({"heads": "all"}, "shared")],
)  # fmt: skip
def test_options_that_there_are_not(options, message):
    with pytest.raises(InputError, match=message):
        MPCache(**options)


def test_leaders_that_cannot_be(view):
    for leaders in ((0, 0), (0, 2, 2, 2), (0, 0, 1, 1)):
        with pytest.raises(InputError, match="layer"):
            MPCache(leaders=leaders).leader_layers(4)
    bare = dataclasses.replace(view, pool=dataclasses.replace(view.pool, bounds=None))
    with pytest.raises(ValueError, match="has none"):
        chosen(MPCache(), bare, 8)
