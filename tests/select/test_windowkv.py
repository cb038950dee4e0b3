"""WindowKV: the properties of a selection by windows, on random keys and queries."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from select_views import (
    attention,
    keep_of,
    kept_by,
    make_view,
    random_arrays,
    slots,
    tokens,
)

from kvjax.errors import InputError
from kvjax.select import SnapKV, View, WindowKV, calibrate_leaders, evict, windowkv

SHARES = ((4.0, 1.0), *(((1.0, 1.0),) * 7))
ALL = [
    WindowKV(window=8, alpha=4),
    WindowKV(window=4, alpha=4, group=4, exact=True),
    WindowKV(window=4, alpha=4, group=2, budgets="code"),
    WindowKV(window=4, alpha=4, group=2, budgets="paper", leaders=(1, 2, 5, 7)),
    WindowKV(window=8, alpha=4, heads="each", kernel=3, overlap=True, distinct=0.5),
    WindowKV(window=4, alpha=1, strategy="top", sink_windows=1, last=4),
    WindowKV(window=4, alpha=4, heads="each", budgets="shares", shares=SHARES),
]  # fmt: skip
names = [f"{p.budgets}-{p.window}-{p.group}" for p in ALL]


@pytest.fixture(scope="module")
def arrays():
    return random_arrays(tokens=64)


@pytest.fixture(scope="module")
def view(arrays):
    return make_view(*arrays)


@pytest.fixture(scope="module")
def short():
    return make_view(*random_arrays(tokens=37, seed=5))


@pytest.mark.parametrize("policy", ALL, ids=names)
@pytest.mark.parametrize("count", [8, 16, 24, 40])
def test_the_budget_is_kept_in_pages(view, short, policy, count):
    for one in (view, short):
        keep = np.asarray(kept_by(policy, one, count))
        length = int(one.length[0, 0, 0])
        held = np.ceil(keep.sum(-1) / 4) * 4
        assert held.mean(axis=(0, 1)).max() <= count  # strict, the suffix included
        assert not keep[..., length:].any()


@pytest.mark.parametrize("policy", ALL, ids=names)
def test_the_whole_budget_keeps_everything(short, policy):
    assert bool(jnp.all(kept_by(policy, short, 37) == short.live))


@pytest.mark.parametrize("policy", ALL, ids=names)
def test_kept_windows_are_whole_and_the_last_tokens_stay(view, policy):
    keep = np.asarray(kept_by(policy, view, 32))
    end = 64 - (policy.alpha if policy.last < 0 else policy.last)
    end = end if policy.exact else end // 4 * 4
    assert keep[..., end:].all()
    for start in range(0, end, policy.unit):
        own = keep[..., start : min(start + policy.unit, end)]
        assert (own.all(-1) | ~own.any(-1)).all()


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_group_keeps_what_its_leader_alone_keeps(view, group):
    policy = WindowKV(window=4, alpha=4, group=group)
    shared = slots(kept_by(policy, view, 24))
    alone = slots(kept_by(WindowKV(window=4, alpha=4), view, 24))
    for layer in range(8):
        assert shared[layer] == alone[layer // group * group]


def test_leaders_are_the_only_layers_that_score(view, monkeypatch):
    scored = []
    original = windowkv.attention_received

    def count(view, layers, *args, **kwargs):
        scored.extend(layers.tolist())
        return original(view, layers, *args, **kwargs)

    monkeypatch.setattr(windowkv, "attention_received", count)
    policy = WindowKV(window=4, alpha=4, group=4, leaders=(2, 5), strategy="mean")
    keep = slots(policy.keep(view, tokens(view, 24)))
    assert scored == [2, 5]
    alone = slots(kept_by(WindowKV(window=4, alpha=4), view, 24))
    assert keep[0] == keep[3] == alone[2]
    assert keep[4] == keep[7] == alone[5]


@pytest.mark.parametrize("top", [None, 1, 2])
def test_windows_are_those_of_the_plain_attention(arrays, view, top):
    q, k, _ = arrays
    weights = attention(q, k)[0][..., -4:, :60].sum(-2)  # [L, B, H, 60]
    windows = weights.reshape(*weights.shape[:-1], 15, 4)
    windows = np.sort(windows, -1)[..., -(top or 4) :].mean(-1).mean(2)  # [L, B, 15]
    strategy = "mean" if top is None else "top"
    policy = WindowKV(window=4, alpha=4, strategy=strategy, top=top or 0)
    keep = np.asarray(kept_by(policy, view, 24))  # 20 tokens beside the suffix
    for layer, row in np.ndindex(8, 2):
        best = set(np.argsort(-windows[layer, row])[:5])
        found = np.flatnonzero(keep[layer, 0, row, :60].reshape(15, 4).all(-1))
        assert set(found) == best


def test_one_token_windows_are_snapkv_of_all_heads(view):
    policy = WindowKV(window=1, alpha=4, exact=True)
    snap = SnapKV(last=4, kernel=1)
    mean = jnp.broadcast_to(jnp.mean(snap.scores(view), axis=1, keepdims=True), view.shape)
    free = jnp.where(view.slot < 60, mean, -jnp.inf)
    best = jnp.argsort(-free, axis=-1)[..., :12]
    kept = kept_by(policy, view, 16)
    assert all(
        set(best[layer, 0, row].tolist()) | {60, 61, 62, 63} == set(own[0][row])
        for layer, own in enumerate(slots(kept))
        for row in range(2)
    )


@pytest.mark.parametrize("budgets", ["uniform", "code"])
def test_more_budget_keeps_all_that_less_keeps(view, budgets):
    policy = WindowKV(window=4, alpha=4, group=2, budgets=budgets, share_rest=False)
    kept = [np.asarray(kept_by(policy, view, count)) for count in (8, 16, 32, 48, 64)]
    for less, more in itertools.pairwise(kept):
        assert not (less & ~more).any()


@pytest.mark.parametrize("window", [1, 4, 8])
def test_the_count_of_the_released_code(view, window):
    policy = WindowKV(window=window, alpha=4, exact=True, strict=False, share_rest=False)
    for budget in (1, 3, 4, 8, 9, 12, 17, 59, 60, 61):
        keep = np.asarray(kept_by(policy, view, budget + 4))[0, 0, 0, :60]
        found = sum(keep[start : start + window].any() for start in range(0, 60, window))
        windows = -(-60 // window)
        dropped = max(0, -(-(60 - budget) // window))
        expected = windows - dropped if dropped * window < 60 else 0  # else the suffix alone
        assert found == expected
        assert min(windows, budget // window) <= found <= -(-budget // window)


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch_nor_on_what_is_beyond_its_end():
    q, k, v = random_arrays(rows=3, tokens=64)
    policy = WindowKV(window=8, alpha=4, group=2, heads="each")
    lengths = [64, 41, 23]
    together = make_view(q, k, v, lengths=lengths)
    budget = jnp.asarray([24, 16, 16], jnp.int32)
    keep = np.asarray(keep_of(policy, together, budget))
    for row, length in enumerate(lengths):
        own = slice(row, row + 1)
        alone = make_view(q[:, own, :length], k[:, own, :length], v[:, own, :length])
        expected = np.asarray(keep_of(policy, alone, budget[own]))[:, :, 0]
        assert np.array_equal(keep[:, :, row, : expected.shape[-1]], expected)
        assert not keep[:, :, row, expected.shape[-1] :].any()


def test_the_task_of_a_row_chooses_its_rule(view):
    mean = kept_by(WindowKV(window=8, alpha=4, strategy="mean"), view, 24)
    top = kept_by(WindowKV(window=8, alpha=4, strategy="top"), view, 24)
    assert not jnp.array_equal(mean, top)
    mixed = dataclasses.replace(view, task=jnp.asarray([0, 1], jnp.int32))
    paper = kept_by(WindowKV(window=8, alpha=4), mixed, 24)
    demo = kept_by(WindowKV(window=8, alpha=4, strategy="demo"), mixed, 24)
    assert jnp.array_equal(paper[:, :, 0], mean[:, :, 0])
    assert jnp.array_equal(paper[:, :, 1], top[:, :, 1])
    assert jnp.array_equal(demo[:, :, 0], top[:, :, 0])
    assert jnp.array_equal(demo[:, :, 1], mean[:, :, 1])


def test_a_planted_needle_stays_under_every_budget_that_holds_a_window():
    q, k, v = random_arrays(tokens=64, sharp=0.1)
    k[:, :, 17] = 4 * q[:, :, -4:].mean(2)[:, :, :2] / 0.1  # what the last queries look for
    view = make_view(q, k, v)
    policy = WindowKV(window=4, alpha=4, group=4)
    for count in (8, 12, 24):
        keep = kept_by(policy, view, count)
        assert bool(jnp.all(keep[..., 16:20]))
    only = kept_by(policy, view, 4)  # the suffix alone, in every layer
    assert slots(only)[0] == slots(only)[7] == [[[60, 61, 62, 63]] * 2] * 2


def test_the_same_under_jit_and_after_another_prompt(view, short):
    policy = WindowKV(window=4, alpha=4, group=2, budgets="paper")
    first = kept_by(policy, view, 24)
    kept_by(policy, short, 16)
    assert jnp.array_equal(first, kept_by(policy, view, 24))
    assert jnp.array_equal(first, policy.keep(view, tokens(view, 24)))


def test_what_is_evicted_can_be_chosen_from_again(view):
    policy = WindowKV(window=4, alpha=4)
    first = evict(view.pool, view.table, kept_by(policy, view, 32), whole_pages=True)
    again = View(pool=first.pool, table=first.table, seen=view.seen)
    second = kept_by(policy, again, 16)
    direct = slots(kept_by(policy, view, 16))
    kept = slots(kept_by(policy, view, 32))
    # The scores of what is left are as they were: the better ones of the first choice stay.
    for layer, head, row in np.ndindex(8, 2, 2):
        found = np.asarray(kept[layer][head][row])[slots(second)[layer][head][row]]
        assert found.tolist() == direct[layer][head][row]


def test_calibration_finds_the_layer_that_finds():
    q, k, v = random_arrays(tokens=64, sharp=0.05)
    # Layers 1 to 3 look at the same place, layer 0 nowhere; and 6 alone in the second group.
    for layer in (1, 2, 3, 6):
        k[layer, :, 32:36] = 400 * q[layer, :, None, -1, :1]
    view = make_view(q, k, v)
    policy = WindowKV(window=4, alpha=4, group=4)
    leaders = calibrate_leaders(view, tokens(view, 8), policy)
    assert leaders[0] in (1, 2, 3)
    assert leaders[1] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 3}, "do not divide"),
        ({"group": 4, "leaders": (0, 3)}, "cannot lead"),
        ({"group": 4, "leaders": (0,)}, "leaders"),
        ({"window": 6}, "whole pages"),
        ({"budgets": "shares", "shares": ((1.0,),)}, "shares"),
    ],
)
def test_what_does_not_fit_is_said(view, options, message):
    with pytest.raises(InputError, match=message):
        kept_by(WindowKV(**{"window": 4, "alpha": 4, **options}), view, 16)


@pytest.mark.parametrize("options", [{"strategy": "best"}, {"overlap": True, "window": 3}])
def test_what_is_no_option_is_said(options):
    with pytest.raises(InputError):
        WindowKV(**options)


def test_foresight_keeps_what_values_promise_beside_what_was_looked_at(arrays, view):
    """Half of the budget goes to the windows that hold the values it points to."""
    v = arrays[2]
    layers, _, _, kv_heads, d = v.shape
    weights = np.zeros((layers, kv_heads, d + 1), np.float32)
    weights[..., 3] = 1.0
    policy = WindowKV(
        window=4, alpha=4, heads="each", distinct=0.5,
        foresight=tuple(tuple(map(tuple, heads)) for heads in weights.tolist()),
    )  # fmt: skip
    keep = np.asarray(kept_by(policy, view, 36))[..., :60]  # of 64, the last page stays
    without = np.asarray(kept_by(dataclasses.replace(policy, distinct=0.0), view, 20))[..., :60]
    assert (keep >= without).all()  # 16 of 32 tokens as the last queries want
    promised = np.moveaxis(v[..., 3], 3, 1)[..., :60]  # [L, K, B, 60]
    best = promised.reshape(*promised.shape[:3], 15, 4).max(-1)
    rest = keep & ~without
    for at in np.ndindex(keep.shape[:3]):
        taken = rest[at].reshape(15, 4).all(-1)
        left = ~keep[at].reshape(15, 4).any(-1)
        assert taken.sum() == 4
        assert best[at][taken].min() > best[at][left].max()


def test_foresight_of_another_model_is_refused(view):
    policy = WindowKV(window=4, alpha=4, distinct=0.5, foresight=(((1.0, 2.0),),))
    with pytest.raises(InputError, match="another model"):
        policy.keep(view, tokens(view, 16))
