"""The pool's operations against numpy, eager and jitted with donation, in layer and head groups."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    CacheConfig,
    KVPool,
    PageTable,
    Slots,
    advance,
    compact,
    copy_pages,
    gather,
    slots_of,
    write,
    write_positions,
)
from kvjax.pallas_kernels.page_attention import Items, WorkList, page_attention

NOWHERE = np.iinfo(np.int32).max
# Layers of 3 in groups of 2: the last group spans one. Heads of 4 in groups of 2.
GROUPED = CacheConfig(
    num_pages=24, page_size=4, num_layers=3, num_kv_heads=4, head_dim=8, max_rows=3,
    pages_per_row=2, layers_per_page=2, heads_per_page=2, track_positions=True,
)  # fmt: skip


def i32(x):
    return jnp.asarray(x, jnp.int32)


def poured(config, value=np.nan):
    """A pool full of `value`; the position plane, where there is one, full of -1."""
    pool, table = config.init()
    full = np.full(pool.k.shape, value, pool.k.dtype)
    return dataclasses.replace(pool, k=jnp.asarray(full), v=jnp.asarray(full)), table


def random_table(rng, config, lengths):
    """Every row has all its pages, in random order; rows of `lengths` slots at such positions."""
    groups = (*config.tables, config.max_rows)
    pages = rng.permutation(config.num_pages)[: np.prod(groups) * config.pages_per_row]
    lengths = np.broadcast_to(lengths, groups)
    return PageTable(
        pages=i32(pages.reshape(*groups, -1)), length=i32(lengths),
        position=i32(lengths.max(axis=(0, 1))),
    )  # fmt: skip


def fill(rng, config, pool, table):
    """Random tokens in all slots in use; returns the pool and dense k, v [L, B, S, K, D]."""
    k, v, pages, length = map(np.array, (pool.k, pool.v, table.pages, table.length))
    size = config.page_size
    shape = (config.num_layers, config.max_rows, config.pages_per_row * size)
    dense = np.zeros((2, *shape, config.num_kv_heads, config.head_dim), np.float32)
    for layer, row, head in np.ndindex(shape[0], shape[1], config.num_kv_heads):
        g, h = layer // config.R, head // config.C
        for slot in range(length[g, h, row]):
            page = pages[g, h, row, slot // size]
            where = page, layer % config.R, head % config.C, slot % size
            k[where], v[where] = dense[:, layer, row, slot, head] = rng.normal(
                size=(2, config.head_dim)
            )
    return dataclasses.replace(pool, k=jnp.asarray(k), v=jnp.asarray(v)), *dense


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Writing.


def test_write_puts_each_token_of_each_layer_into_its_group(run):
    """R=2 of 3 layers, C=2 of 4 heads; tokens without a place leave no trace."""
    config, rng = GROUPED, np.random.default_rng(0)
    pool, _ = poured(config)
    pages = rng.permutation(config.num_pages)[:20].reshape(2, 2, 5)
    pages[:, :, 1] = config.num_pages  # no page
    pages[0, 1, 2] = NOWHERE  # no page in this group only
    offset = rng.integers(0, 4, size=(2, 2, 5))
    slots = Slots(page=i32(pages), offset=i32(offset))
    k, v = rng.normal(size=(2, 3, 5, 4, 8)).astype(np.float32)
    want_k, want_v = np.array(pool.k), np.array(pool.v)
    for layer, token, head in np.ndindex(3, 5, 4):
        g, h = layer // 2, head // 2
        if pages[g, h, token] < config.num_pages:
            where = pages[g, h, token], layer % 2, head % 2, offset[g, h, token]
            want_k[where], want_v[where] = k[layer, token, head], v[layer, token, head]
    step = run(write)
    for layer in range(3):
        pool = step(pool, i32(layer), jnp.asarray(k[layer]), jnp.asarray(v[layer]), slots)
    same((pool.k, pool.v), (want_k, want_v))


def test_write_casts_to_the_pools_dtype(run):
    config = dataclasses.replace(GROUPED, dtype="bfloat16")
    pool, _ = config.init()
    slots = Slots(page=jnp.zeros((2, 2, 1), jnp.int32), offset=jnp.ones((2, 2, 1), jnp.int32))
    k = jnp.full((1, 4, 8), 1.001, jnp.float32)
    pool = run(write)(pool, i32(0), k, 2 * k, slots)
    assert pool.k.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(pool.k[0, 0, :, 1], np.float32), 1.0)
    assert np.sum(np.asarray(pool.v, np.float32) != 0) == 2 * 8  # one token, the C heads of a page


def test_write_positions_once_for_all_layers(run):
    config = GROUPED
    pool, _ = config.init()
    slots = Slots(
        page=i32([[[5, 5, NOWHERE], [6, 6, 24]], [[7, 7, 24], [8, 24, 24]]]),
        offset=i32([[[2, 3, 0]] * 2, [[0, 1, 0]] * 2]),
    )
    pool = run(write_positions)(pool, i32([40, 41, 42]), slots)
    want = np.full((24, 4), -1)
    want[5, 2:], want[6, 2:], want[7, :2], want[8, 0] = [40, 41], [40, 41], [40, 41], 40
    same(pool.position, want)


def test_write_positions_leaves_a_dense_pool_alone(run):
    pool, _ = dataclasses.replace(GROUPED, track_positions=False).init()
    slots = Slots(page=jnp.zeros((2, 2, 1), jnp.int32), offset=jnp.zeros((2, 2, 1), jnp.int32))
    assert run(write_positions)(pool, i32([3]), slots).position is None


# Copying and reading.


def test_copy_pages_moves_every_plane_and_reads_before_it_writes(run):
    rng = np.random.default_rng(1)
    plane = lambda *inner: rng.normal(size=(6, *inner)).astype(np.float32)  # noqa: E731
    pool = KVPool(
        k=plane(1, 2, 4, 8), v=plane(1, 2, 4, 8), bounds=plane(2, 8), scales=plane(4),
        position=rng.integers(0, 99, size=(6, 4)).astype(np.int32),
    )  # fmt: skip
    want = jax.tree.map(np.copy, pool)
    for p, w in zip(jax.tree.leaves(pool), jax.tree.leaves(want), strict=True):
        w[[1, 2, 3]] = p[[0, 1, 0]]  # 0 -> 1 -> 2 is no chain; 0 -> 3 shares the source
    pool = run(copy_pages)(
        jax.tree.map(jnp.asarray, pool),
        i32([0, 1, 5, 4, 0, NOWHERE]),
        i32([1, 2, 6, NOWHERE, 3, 6]),
    )
    same(pool, want)


def test_gather_reads_rows_and_nothing_dead(run):
    """The pool is full of NaN where nobody wrote; a row without pages reads as zeros."""
    config, rng = GROUPED, np.random.default_rng(2)
    table = random_table(rng, config, rng.integers(0, 9, size=(2, 2, 3)))
    pages, length = np.array(table.pages), np.array(table.length)
    pages[:, :, 1, 1] = config.num_pages  # this row has one page only
    length[:, :, 1] = np.minimum(length[:, :, 1], 4)
    table = dataclasses.replace(table, pages=i32(pages), length=i32(length))
    pool, k, v = fill(rng, config, poured(config)[0], table)
    got = run(gather, donate=())(pool, table, i32([2, 1, 2]))
    for dense, out in zip((k, v), got, strict=True):
        assert out.shape == (3, 4, 4, 8, 8)  # layers in whole groups: 4 for 3
        for n, row in enumerate([2, 1, 2]):
            same(out[n, :3], np.swapaxes(dense[:, row], 1, 2))


def test_gather_trusts_no_length_beyond_the_pages(run):
    config = GROUPED
    pool, table = poured(config)
    table = dataclasses.replace(table, length=jnp.full_like(table.length, 8))
    k, v = run(gather, donate=())(pool, table, i32([0]))
    assert not np.any(k) and not np.any(v)


# Evicting.


def tracked(seed, lengths):
    """A filled cache whose true positions have gaps, as after an earlier eviction."""
    config, rng = GROUPED, np.random.default_rng(seed)
    table = random_table(rng, config, lengths)
    pool, k, v = fill(rng, config, poured(config)[0], table)
    plane = np.full((config.num_pages, 4), -1, np.int32)
    pages, lengths = np.asarray(table.pages), np.asarray(table.length)
    position = np.zeros((2, 2, 3, 8), np.int32)
    for g, h, row in np.ndindex(2, 2, 3):
        position[g, h, row] = np.sort(rng.permutation(20)[:8])
        for slot in range(lengths[g, h, row]):
            plane[pages[g, h, row, slot // 4], slot % 4] = position[g, h, row, slot]
    pool = dataclasses.replace(pool, position=jnp.asarray(plane))
    table = dataclasses.replace(table, position=i32([20, 20, 20]))
    return config, rng, pool, table, k, v, position


def test_compact_moves_the_kept_to_the_front_in_order(run):
    """Each layer and head group keeps what it wants; what is not in use is never kept."""
    lengths = np.random.default_rng(3).integers(3, 9, size=(2, 2, 3))
    config, rng, pool, table, k, v, position = tracked(4, lengths)
    before = jax.tree.map(np.array, (pool, table))  # copies: both are donated
    rows = [2, 0]
    keep = rng.random((2, 2, 2, 8)) < 0.5
    keep[0, 0, 0] = False  # everything goes
    keep[1, 1, 1] = True  # everything stays
    pool, table = run(compact, donate=(0, 1))(pool, table, i32(rows), jnp.asarray(keep))
    dense_k, dense_v = map(np.asarray, gather(pool, table, i32(rows)))
    pool, table = jax.tree.map(np.asarray, (pool, table))
    for g, h, n in np.ndindex(2, 2, 2):
        row, old = rows[n], lengths[g, h, rows[n]]
        (kept,) = np.nonzero(keep[g, h, n, :old])
        assert table.length[g, h, row] == len(kept)
        used = -(-len(kept) // 4)
        same(table.pages[g, h, row, :used], before[1].pages[g, h, row, :used])
        same(table.pages[g, h, row, used:], np.full(2 - used, config.num_pages))
        for slot, source in enumerate(kept):
            page = table.pages[g, h, row, slot // 4]
            assert pool.position[page, slot % 4] == position[g, h, row, source]
    for layer, head, n in np.ndindex(3, 4, 2):
        g, h, row = layer // 2, head // 2, rows[n]
        (kept,) = np.nonzero(keep[g, h, n, : lengths[g, h, row]])
        same(dense_k[n, layer, head, : len(kept)], k[layer, row, kept, head])
        same(dense_v[n, layer, head, : len(kept)], v[layer, row, kept, head])
    # The other row and the next true positions are as they were.
    same(
        (table.pages[:, :, 1], table.length[:, :, 1]), (before[1].pages[:, :, 1], lengths[:, :, 1])
    )
    same(table.position, [20, 20, 20])
    others = before[1].pages[:, :, 1].reshape(-1)
    same(jax.tree.map(lambda p: p[others], pool), jax.tree.map(lambda p: p[others], before[0]))


def test_compact_needs_true_positions():
    pool, table = dataclasses.replace(GROUPED, track_positions=False).init()
    with pytest.raises(ValueError, match="track_positions=True"):
        compact(pool, table, i32([0]), jnp.ones((2, 2, 1, 8), bool))


def attend(q, keys, values):
    """One query [H, D] over keys and values [S, K, D] in float64."""
    group, out = len(q) // keys.shape[1], []
    for head, query in enumerate(np.asarray(q, np.float64)):
        score = keys[:, head // group].astype(np.float64) @ query * len(query) ** -0.5
        weight = np.exp(score - score.max())
        out.append(weight @ values[:, head // group] / weight.sum())
    return np.stack(out)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def decode_step(pool, table, q, k, v, window, row):
    """Writes one token per row, then attends with every layer: out [L, T, H, D]."""
    position = table.position[row]
    slots = slots_of(table, row, position, page_size=4)
    pool = write_positions(pool, position, slots)
    table = advance(table, row)
    index = jnp.stack([row, 0 * row, 0 * row + 2, row, row + 1], axis=1)
    items = Items(index=index, count=i32(len(row)), max_queries=1, max_pages=2)
    work = WorkList(items=(items,), pages=table.pages, length=table.length, query_position=position)
    out = []
    for layer in range(q.shape[0]):
        pool = write(pool, i32(layer), k[layer], v[layer], slots)
        out.append(page_attention(q[layer], pool, i32(layer), work, window=window)[0])
    return jnp.stack(out), pool, table


@pytest.mark.parametrize("window", [0, 12])
def test_a_step_after_an_eviction_sees_the_kept_tokens(window):
    """Window and causality by true positions, which the kept slots no longer are."""
    lengths = np.random.default_rng(5).integers(4, 8, size=(2, 2, 3))
    config, rng, pool, table, k, v, position = tracked(6, lengths)
    keep = rng.random((2, 2, 3, 8)) < 0.5
    evict = jax.jit(compact, donate_argnums=(0, 1))
    pool, table = evict(pool, table, i32([0, 1, 2]), jnp.asarray(keep))
    # A page that was given up belongs to somebody else now; the row needs one for the new token.
    used = {int(p) for p in np.asarray(table.pages).reshape(-1)}
    free = [p for p in range(config.num_pages) if p not in used]
    pages, need = np.array(table.pages), np.array(table.length) // 4
    for where in np.ndindex(2, 2, 3):
        if pages[(*where, need[where])] == config.num_pages:
            pages[(*where, need[where])] = free.pop()
    table = dataclasses.replace(table, pages=i32(pages))
    pool = jax.tree.map(np.array, pool)
    pool.k[free], pool.v[free], pool.position[free] = np.nan, np.nan, 0
    pool = jax.tree.map(jnp.asarray, pool)
    q = rng.normal(size=(3, 3, 8, 8)).astype(np.float32)
    new = rng.normal(size=(2, 3, 3, 4, 8)).astype(np.float32)
    out, pool, table = decode_step(
        pool, table, jnp.asarray(q), *map(jnp.asarray, new), i32(window), i32([0, 1, 2])
    )
    out = np.asarray(out)
    for layer, row, h in np.ndindex(3, 3, 2):
        g, heads = layer // 2, slice(2 * h, 2 * h + 2)
        kept = keep[g, h, row] & (np.arange(8) < lengths[g, h, row])
        if window:  # the query stands at position 20
            kept &= position[g, h, row] > 20 - window
        tokens = [
            np.concatenate([old[layer, row, kept, heads], now[layer, row, None, heads]])
            for old, now in zip((k, v), new, strict=True)
        ]
        # float32 sums over 9 keys: 1e-6 of rounding, an order of magnitude of room.
        np.testing.assert_allclose(
            out[layer, row, 4 * h : 4 * h + 4], attend(q[layer, row, 4 * h : 4 * h + 4], *tokens),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
    assert list(table.position) == [21, 21, 21]


# Sizes.

SIZES = CacheConfig(
    num_pages=10, page_size=16, num_layers=4, num_kv_heads=2, head_dim=64, max_rows=3,
    pages_per_row=5,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "cpu", "gpu", "tpu"),
    [
        # 2 (k, v) * 4 layers * 2 heads * 16 tokens * 64 dims * 4 bytes; a TPU pads 64 to 128 lanes.
        ({}, 65_536, 65_536, 131_072),
        ({"dtype": "bfloat16"}, 32_768, 32_768, 65_536),
        ({"dtype": "bfloat16", "head_dim": 128}, 65_536, 65_536, 65_536),
        # One token a page: 8 sublanes of float32, 16 of bfloat16.
        ({"page_size": 1}, 4_096, 4_096, 65_536),
        ({"page_size": 1, "dtype": "bfloat16"}, 2_048, 2_048, 65_536),
        # Two layers and one head a page: a quarter.
        ({"layers_per_page": 2, "heads_per_page": 1}, 16_384, 16_384, 32_768),
        # A position of 4 bytes for each of the 16 tokens.
        ({"track_positions": True}, 65_600, 65_600, 131_136),
    ],
)
def test_page_bytes(changes, cpu, gpu, tpu):
    config = dataclasses.replace(SIZES, **changes)
    assert [config.page_bytes(p) for p in ("cpu", "gpu", "tpu")] == [cpu, gpu, tpu]


def test_nbytes_is_what_init_allocates():
    assert SIZES.nbytes("cpu") == 10 * 65_536 + 4 * 3 * 5 + 4 * 3 + 4 * 3
    for config in (SIZES, GROUPED, dataclasses.replace(GROUPED, dtype="bfloat16")):
        assert sum(x.nbytes for x in jax.tree.leaves(config.init())) == config.nbytes("cpu")


def test_init_is_empty():
    pool, table = GROUPED.init()
    assert pool.k.shape == pool.v.shape == (24, 2, 2, 4, 8)  # [N, R, C, P, D]
    assert np.all(pool.position == -1) and pool.position.shape == (24, 4)
    assert table.pages.shape == (2, 2, 3, 2) and np.all(table.pages == 24)  # [L/R, K/C, B, M]
    assert not np.any(table.length) and not np.any(table.position)
    assert SIZES.init()[0].position is None


def test_heads_must_divide():
    with pytest.raises(ValueError, match="heads_per_page=3"):
        dataclasses.replace(SIZES, heads_per_page=3)
