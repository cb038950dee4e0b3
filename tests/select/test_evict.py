"""Eviction: who keeps what, what is free, and that no byte moves where whole pages stay."""

import jax.numpy as jnp
import numpy as np
import pytest
from select_views import make_view, random_arrays

from kvjax.cache import PageLedger, gather
from kvjax.select import evict, pages_held


def dense(view, table, pool):
    k, _ = gather(pool, table, jnp.arange(view.shape[2]))
    return np.asarray(k)  # [B, L, K, M * P, D]


@pytest.mark.parametrize(("r", "c"), [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("whole_pages", [True, False])
def test_kept_tokens_stand_in_order_and_the_rest_is_free(r, c, whole_pages):
    q, k, v = random_arrays(layers=4, tokens=22)
    view = make_view(q, k, v, page_size=4, spare=2, layers_per_page=r, heads_per_page=c)
    rng = np.random.default_rng(0)
    unit = 4 if whole_pages else 1
    groups = rng.random((4 // r, 2 // c, 2, 32 // unit)) < 0.4
    groups[..., 20 // unit :] = True  # the partly filled page
    keep = np.repeat(np.repeat(np.repeat(groups, unit, -1), r, 0), c, 1)
    out = evict(view.pool, view.table, jnp.asarray(keep), whole_pages=whole_pages, spare=1)
    found = dense(view, out.table, out.pool)
    for layer, head, row in np.ndindex(4, 2, 2):
        slots = np.flatnonzero(keep[layer, head, row, :22])
        own = found[row, layer, head]
        assert np.array_equal(own[: len(slots)], k[layer, row, slots, head])
        assert not own[len(slots) :].any()
    # Every page is in exactly one place: held or spare in a row, or free.
    num_pages = view.pool.k.shape[0]
    both = np.concatenate([np.ravel(out.table.pages), np.ravel(out.freed)])
    assert np.array_equal(np.sort(both[both < num_pages]), np.arange(num_pages))
    assert out.table.position.tolist() == [22, 22]


def test_whole_pages_move_no_byte():
    q, k, v = random_arrays(layers=2, tokens=16)
    view = make_view(q, k, v, page_size=4)
    keep = jnp.asarray(np.repeat(np.array([True, False, True, True]), 4))
    keep = jnp.broadcast_to(keep[None, None, None], view.shape)
    out = evict(view.pool, view.table, keep, whole_pages=True)
    assert out.pool is view.pool
    assert out.table.pages[..., :3].tolist() == view.table.pages[..., jnp.array([0, 2, 3])].tolist()
    assert (out.freed != view.pool.k.shape[0]).sum() == 2 * 2 * 2


def test_the_ledger_gets_back_what_was_freed():
    q, k, v = random_arrays(layers=2, tokens=16, rows=3)
    view = make_view(q, k, v, page_size=4)
    num_pages = view.pool.k.shape[0]
    ledger = PageLedger(num_pages)
    ledger.take(num_pages)
    keep = jnp.broadcast_to(view.slot >= 10, view.shape)
    out = evict(view.pool, view.table, keep)
    freed = np.ravel(out.freed)
    ledger.release(freed[freed < num_pages].tolist())
    held = int(pages_held(out.table, num_pages, 4).sum())
    assert ledger.held == held == 2 * 2 * 3 * 2  # six of 16 tokens: two pages
