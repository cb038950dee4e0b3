"""page_attention against literal cases and against a dense float64 oracle."""

import dataclasses

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import CacheConfig
from kvjax.pallas_kernels.page_attention import Items, WorkList, merge, page_attention

# float32 sums over a few hundred keys: 1e-6 of rounding, an order of magnitude of room.
TOL = {"rtol": 1e-5, "atol": 1e-5}
LAYER = jnp.int32(0)


def items(index, max_queries, max_pages, spare=2):
    """Items with a few unused ones behind them that point at nonsense."""
    index = np.asarray(index, np.int32).reshape(-1, 5)
    padded = np.concatenate([index, np.full((spare, 5), 999, np.int32)])
    return Items(
        index=jnp.asarray(padded), count=jnp.int32(len(index)),
        max_queries=max_queries, max_pages=max_pages,
    )  # fmt: skip


def random_cache(rng, *, rows, pages_per_row, page_size, lengths, heads=2, dim=8, **options):
    """Rows with pages in random order; whatever is not in use is NaN."""
    used = rows * pages_per_row
    config = CacheConfig(
        num_pages=used + 3, page_size=page_size, num_layers=options.pop("layers", 1),
        num_kv_heads=heads, head_dim=dim, max_rows=rows, pages_per_row=pages_per_row, **options,
    )  # fmt: skip
    pool, table = config.init()
    groups = np.prod(config.tables)
    order = np.stack([rng.permutation(config.num_pages)[:used] for _ in range(groups)])
    if groups > 1:  # every group has its own pages
        config = dataclasses.replace(config, num_pages=config.num_pages * int(groups))
        pool, table = config.init()
        order = rng.permutation(config.num_pages)[: used * groups]
    pages = order.reshape(*config.tables, rows, pages_per_row)
    lengths = np.broadcast_to(np.asarray(lengths, np.int32), (*config.tables, rows))
    k, v = (np.full(pool.k.shape, np.nan, np.float32) for _ in range(2))
    dense_k, dense_v = (
        np.zeros((config.num_layers, rows, pages_per_row * page_size, heads, dim)) for _ in range(2)
    )
    for layer in range(config.num_layers):
        for head in range(heads):
            g, h = layer // config.R, head // config.C
            for b in range(rows):
                for s in range(lengths[g, h, b]):
                    where = (
                        pages[g, h, b, s // page_size], layer % config.R, head % config.C,
                        s % page_size,
                    )  # fmt: skip
                    k[where], v[where] = rng.normal(size=(2, dim))
                    dense_k[layer, b, s, head] = k[where]
                    dense_v[layer, b, s, head] = v[where]
    pool = dataclasses.replace(pool, k=jnp.asarray(k), v=jnp.asarray(v))
    table = dataclasses.replace(
        table, pages=jnp.asarray(pages, jnp.int32), length=jnp.asarray(lengths)
    )
    return config, pool, table, dense_k, dense_v


def work_list(table, index_lists, positions):
    return WorkList(
        items=tuple(index_lists), pages=table.pages, length=table.length,
        query_position=jnp.asarray(positions, jnp.int32),
    )  # fmt: skip


def test_uniform_scores_average_the_values():
    """Keys of zero give every key the same weight: the output is the mean, lse the log count."""
    pool, table = CacheConfig(
        num_pages=4, page_size=2, num_layers=1, num_kv_heads=1, head_dim=2, max_rows=1,
        pages_per_row=2,
    ).init()  # fmt: skip
    v = pool.v.at[2, 0, 0].set(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    v = v.at[0, 0, 0, 0].set(jnp.array([8.0, 0.0]))
    pool = dataclasses.replace(pool, v=v)
    table = dataclasses.replace(
        table, pages=jnp.array([[[[2, 0]]]]), length=jnp.array([[[3]]], jnp.int32)
    )
    work = work_list(table, [items([[0, 0, 2, 0, 1]], 1, 2)], [2])
    out, lse = page_attention(jnp.ones((1, 1, 2)), pool, LAYER, work)
    np.testing.assert_allclose(out[0, 0], [4.0, 2.0], rtol=1e-6)  # (1, 2), (3, 4), (8, 0)
    np.testing.assert_allclose(lse[0, 0], np.log(3), rtol=1e-6)


@pytest.mark.parametrize("window", [None, 0, 1, 3])
def test_who_sees_whom_in_a_chunk(window):
    """A chunk of 4 tokens behind a context of 2, as a grid that a reader checks by eye."""
    grids = {
        None: ["111...", "1111..", "11111.", "111111"],
        0: ["111...", "1111..", "11111.", "111111"],
        1: ["..1...", "...1..", "....1.", ".....1"],
        3: ["111...", ".111..", "..111.", "...111"],
    }
    seen = np.array([[c == "1" for c in row] for row in grids[window]])
    rng = np.random.default_rng(0)
    _, pool, table, k, v = random_cache(rng, rows=1, pages_per_row=3, page_size=2, lengths=[6])
    q = rng.normal(size=(4, 4, 8)).astype(np.float32)
    work = work_list(table, [items([[0, 0, 3, 0, 4]], 4, 3)], [2, 3, 4, 5])
    window = None if window is None else jnp.int32(window)
    out, lse = page_attention(jnp.asarray(q), pool, LAYER, work, window=window)
    want, want_lse = dense.attend(q, k[0, 0], v[0, 0], seen)
    np.testing.assert_allclose(out, want, **TOL)
    np.testing.assert_allclose(lse, want_lse, **TOL)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("group", [1, 4])
def test_ragged_decode_split_at_fixed_sizes(page_size, group):
    rng = np.random.default_rng(page_size)
    lengths = [1, 0, 17, 40, 64]
    pages_per_row = 64 // page_size
    _, pool, table, k, v = random_cache(
        rng, rows=5, pages_per_row=pages_per_row, page_size=page_size, lengths=lengths
    )
    q = rng.normal(size=(5, 2 * group, 8)).astype(np.float32)
    split = max(1, 16 // page_size)
    index = [[b, p, p + split, b, b + 1] for b in range(5) for p in range(0, pages_per_row, split)]
    work = work_list(table, [items(index, 1, split)], np.asarray(lengths) - 1)
    out, lse = page_attention(jnp.asarray(q), pool, LAYER, work)
    for b, length in enumerate(lengths):
        seen = np.arange(64)[None] < length
        want, want_lse = dense.attend(q[b : b + 1], k[0, b], v[0, b], seen)
        np.testing.assert_allclose(out[b : b + 1], want, **TOL)
        np.testing.assert_allclose(lse[b : b + 1], want_lse, **TOL)
    assert np.all(np.isneginf(lse[1])) and np.all(out[1] == 0)


def test_a_prefix_shared_by_rows_is_one_item():
    """Three rows with the same first two pages: one item for the prefix, one a row for its own."""
    rng = np.random.default_rng(3)
    _, pool, table, k, v = random_cache(
        rng, rows=3, pages_per_row=4, page_size=4, lengths=[12, 9, 16]
    )
    shared = table.pages.at[:, :, 1:, :2].set(table.pages[:, :, :1, :2])
    table = dataclasses.replace(table, pages=shared)
    k[0, 1:, :8], v[0, 1:, :8] = k[0, 0, :8], v[0, 0, :8]
    q = rng.normal(size=(3, 4, 8)).astype(np.float32)
    index = [[0, 0, 2, 0, 3], [0, 2, 4, 0, 1], [1, 2, 4, 1, 2], [2, 2, 4, 2, 3]]
    work = work_list(table, [items(index[:1], 3, 2), items(index[1:], 1, 2)], [11, 8, 15])
    out, _ = page_attention(jnp.asarray(q), pool, LAYER, work)
    for b, length in enumerate([12, 9, 16]):
        seen = np.arange(16)[None] < length
        want, _ = dense.attend(q[b : b + 1], k[0, b], v[0, b], seen)
        np.testing.assert_allclose(out[b : b + 1], want, **TOL)


def test_layer_and_head_groups_have_tables_of_their_own():
    """R=2 of 3 layers and C=1 of 2 heads a page, with other lengths in every group."""
    rng = np.random.default_rng(4)
    lengths = rng.integers(1, 12, size=(2, 2, 2))
    _, pool, table, k, v = random_cache(
        rng, rows=2, pages_per_row=3, page_size=4, lengths=lengths, layers=3,
        layers_per_page=2, heads_per_page=1,
    )  # fmt: skip
    q = rng.normal(size=(2, 4, 8)).astype(np.float32)
    index = [[b, 0, 3, b, b + 1] for b in range(2)]
    work = work_list(table, [items(index, 1, 3)], [50, 50])
    attend = jax.jit(page_attention)
    for layer in range(3):
        out, _ = attend(jnp.asarray(q), pool, jnp.int32(layer), work)
        for b in range(2):
            for head in range(2):
                length = lengths[layer // 2, head, b]
                seen = np.arange(12)[None] < length
                args = (k[layer, b][:, head : head + 1], v[layer, b][:, head : head + 1])
                want, _ = dense.attend(q[b : b + 1, 2 * head : 2 * head + 2], *args, seen)
                np.testing.assert_allclose(out[b : b + 1, 2 * head : 2 * head + 2], want, **TOL)


def test_true_positions_decide_where_the_pool_has_them():
    """After an eviction slots are not positions: windows and the causal rule go by the plane."""
    rng = np.random.default_rng(5)
    config, pool, table, k, v = random_cache(
        rng, rows=1, pages_per_row=2, page_size=4, lengths=[7], track_positions=True
    )
    kept = np.array([0, 3, -1, 9, 20, 21, 22])  # -1: a dead slot between live ones
    plane = np.full((config.num_pages, 4), -1, np.int32)
    for s, position in enumerate(kept):
        plane[table.pages[0, 0, 0, s // 4], s % 4] = position
    pool = dataclasses.replace(pool, position=jnp.asarray(plane))
    q = rng.normal(size=(2, 2, 8)).astype(np.float32)
    work = work_list(table, [items([[0, 0, 2, 0, 2]], 2, 2)], [21, 22])
    out, _ = page_attention(jnp.asarray(q), pool, LAYER, work, window=jnp.int32(14))
    seen = np.array([[p >= 0 and 21 - 14 < p <= 21 for p in kept] + [False]])
    seen = np.concatenate([seen, [[p >= 0 and 22 - 14 < p <= 22 for p in kept] + [False]]])
    want, _ = dense.attend(q, k[0, 0], v[0, 0], seen)
    np.testing.assert_allclose(out, want, **TOL)


def test_padding_queries_and_soft_cap():
    rng = np.random.default_rng(6)
    _, pool, table, k, v = random_cache(rng, rows=1, pages_per_row=2, page_size=4, lengths=[8])
    q = 5 * rng.normal(size=(3, 2, 8)).astype(np.float32)
    work = work_list(table, [items([[0, 0, 2, 0, 3]], 4, 2)], [7, -1, 7])
    out, lse = page_attention(jnp.asarray(q), pool, LAYER, work, soft_cap=2.0, scale=0.7)
    want, want_lse = dense.attend(
        q,
        k[0, 0],
        v[0, 0],
        np.array([[True] * 8, [False] * 8, [True] * 8]),
        scale=0.7,
        soft_cap=2.0,
    )
    np.testing.assert_allclose(out, want, **TOL)
    np.testing.assert_allclose(lse, want_lse, **TOL)


def test_shapes_that_do_not_fit_are_named():
    _, pool, table, _, _ = random_cache(
        np.random.default_rng(0), rows=1, pages_per_row=1, page_size=4, lengths=[4]
    )
    work = work_list(table, [items([[0, 0, 1, 0, 1]], 1, 1)], [3])
    with pytest.raises(ValueError, match=r"q\.shape=\(1, 3, 8\)"):
        page_attention(jnp.ones((1, 3, 8)), pool, LAYER, work)
    with pytest.raises(NotImplementedError, match="nonsense"):
        page_attention(jnp.ones((1, 2, 8)), pool, LAYER, work, implementation="nonsense")


def test_merge_is_commutative_associative_and_guarded():
    rng = np.random.default_rng(7)
    parts = [(jnp.asarray(rng.normal(size=(5, 8)), jnp.float32), None) for _ in range(3)]
    lses = [jnp.asarray(30 * rng.normal(size=5), jnp.float32) for _ in range(3)]
    a, b, c = [(out, lse) for (out, _), lse in zip(parts, lses, strict=True)]
    left, right = merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c))
    for x, y in zip(left, right, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    for x, y in zip(merge(*a, *b), merge(*b, *a), strict=True):
        np.testing.assert_array_equal(x, y)
    nothing = jnp.zeros((5, 8)), jnp.full((5,), -jnp.inf)
    for x, y in zip(merge(*a, *nothing), a, strict=True):
        np.testing.assert_array_equal(x, y)
    out, lse = merge(*nothing, *nothing)
    assert np.all(out == 0) and np.all(np.isneginf(lse))
