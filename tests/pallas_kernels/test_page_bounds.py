"""`page_bounds`: bounds of pages, kept up as tokens come, and scores over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.page_bounds import (
    append_bounds,
    merge_pages,
    page_scores,
    rebuild_bounds,
    score_bounds,
)

APPEND = jax.jit(append_bounds)
LAYERS, HEADS, KV_HEADS, SIZE, DIM, ENTRIES, ROWS = 2, 4, 2, 4, 8, 5, 2


class Cache:
    """Keys of two rows in shuffled pages; what no row has written is NaN."""

    def __init__(self, lengths=(18, 7), layers_per_page=1, heads_per_page=1, seed=0):
        rng = np.random.default_rng(seed)
        self.keys = rng.normal(size=(LAYERS, KV_HEADS, ROWS, ENTRIES * SIZE, DIM))
        self.keys = self.keys.astype(np.float32)
        self.keys[:, :, :, ::7] *= 20  # outliers
        self.lengths, self.r, self.c = lengths, layers_per_page, heads_per_page
        groups = LAYERS // self.r, KV_HEADS // self.c
        count = groups[0] * groups[1] * ROWS * ENTRIES
        pages = rng.permutation(count).astype(np.int32).reshape(*groups, ROWS, ENTRIES)
        k = np.full((count, self.r, self.c, SIZE, DIM), np.nan, np.float32)
        for layer, head, row in np.ndindex(LAYERS, KV_HEADS, ROWS):
            for slot in range(lengths[row]):
                page = pages[layer // self.r, head // self.c, row, slot // SIZE]
                own = self.keys[layer, head, row, slot]
                k[page, layer % self.r, head % self.c, slot % SIZE] = own
        self.k, self.pages = jnp.asarray(k), jnp.asarray(pages)
        lengths = np.asarray(lengths, np.int32)
        self.length = jnp.asarray(np.broadcast_to(lengths, (*groups, ROWS)))

    def bounds(self):
        return rebuild_bounds(self.k, None, self.pages, self.length)

    def scores(self, q, layer=1, **options):
        arguments = jnp.int32(layer), self.pages, self.length, SIZE
        return np.asarray(page_scores(jnp.asarray(q), self.bounds(), *arguments, **options))

    def clusters(self, layer=1):
        """(head, row, entry, keys of the cluster) of every page in use."""
        for head, row, entry in np.ndindex(KV_HEADS, ROWS, ENTRIES):
            first, end = entry * SIZE, min((entry + 1) * SIZE, self.lengths[row])
            if first < end:
                yield head, row, entry, self.keys[layer, head, row, first:end]


def queries(seed=1):
    return np.random.default_rng(seed).normal(size=(ROWS, HEADS, DIM)).astype(np.float32)


@pytest.mark.parametrize("layers, heads", [(1, 1), (2, 1), (2, 2)])
def test_no_product_is_above_the_exact_bound_nor_far_below(layers, heads):
    cache, q = Cache(layers_per_page=layers, heads_per_page=heads), queries()
    scores = cache.scores(q, rep="exact_bound")
    for head, row, entry, keys in cache.clusters():
        for h in (2 * head, 2 * head + 1):
            corner = np.maximum(q[row, h] * keys.max(0), q[row, h] * keys.min(0)).sum()
            assert scores[row, h, entry] >= (keys @ q[row, h]).max() - 1e-4
            assert scores[row, h, entry] == pytest.approx(corner, rel=1e-5, abs=1e-4)
    assert np.isinf(scores[1, :, 2:]).all()  # 7 tokens are in two pages


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.6, 1.0])
def test_linear_identity(alpha):
    cache, q = Cache(), queries()
    scores = cache.scores(q, alpha=alpha)
    for head, row, entry, keys in cache.clusters():
        middle, width = (keys.max(0) + keys.min(0)) / 2, keys.max(0) - keys.min(0)
        for h in (2 * head, 2 * head + 1):
            expected = q[row, h] @ middle + (alpha - 0.5) * q[row, h] @ width
            assert scores[row, h, entry] == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_linear_is_the_bound_of_a_positive_query_at_alpha_1():
    cache, q = Cache(), np.abs(queries())
    both = [cache.scores(q, rep=rep, alpha=1.0) for rep in ("linear_minmax", "exact_bound")]
    np.testing.assert_allclose(*both, rtol=1e-6)


def test_one_key_is_its_own_representation():
    cache, q = Cache(lengths=(1, 1)), queries()
    for rep in ("linear_minmax", "exact_bound", "mean"):
        scores = cache.scores(q, rep=rep)
        for head, row, _, keys in cache.clusters():
            for h in (2 * head, 2 * head + 1):
                assert scores[row, h, 0] == pytest.approx(keys[0] @ q[row, h], rel=1e-4, abs=1e-4)


def test_mean_is_the_product_with_the_mean_key():
    cache, q = Cache(), queries()
    scores = cache.scores(q, rep="mean")
    for head, row, entry, keys in cache.clusters():
        expected = keys.mean(0) @ q[row, 2 * head]
        assert scores[row, 2 * head, entry] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_parents_bound_their_children():
    cache, q = Cache(), jnp.asarray(queries())
    count = jnp.clip(
        jnp.asarray(cache.lengths)[:, None] - SIZE * jnp.arange(ENTRIES)[None], 0, SIZE
    )
    count = jnp.broadcast_to(count[None], (KV_HEADS, ROWS, ENTRIES))
    bounds = cache.bounds()[cache.pages[1]][:, :, :, 0, 0]  # [K, B, M, 3, D]
    children = np.asarray(score_bounds(q, bounds, count, rep="exact_bound", alpha=0.6))
    merged, tokens = merge_pages(bounds, count, 2)
    parents = np.asarray(score_bounds(q, merged, tokens, rep="exact_bound", alpha=0.6))
    assert parents.shape[-1] == 3
    assert (np.repeat(parents, 2, axis=-1)[..., :ENTRIES] >= children - 1e-4).all()
    assert np.asarray(tokens)[0].tolist() == [[8, 8, 2], [7, 0, 0]]


@pytest.mark.parametrize("layers, heads", [(1, 1), (2, 2)])
def test_appended_one_by_one_as_computed_anew(layers, heads):
    cache = Cache(layers_per_page=layers, heads_per_page=heads)
    whole = np.asarray(cache.bounds())
    # Pages had other owners before: their bounds must not outlive them.
    bounds = jnp.full(whole.shape, 1e9, jnp.float32)
    pages = np.asarray(cache.pages)
    for slot in range(max(cache.lengths)):
        rows = [row for row in range(ROWS) if slot < cache.lengths[row]]
        before = np.asarray(bounds)
        for layer in range(LAYERS):
            page = pages[layer // layers][:, rows, slot // SIZE]
            k = np.moveaxis(cache.keys[layer][:, rows, slot], 0, 1)
            offset = np.full(page.shape, slot % SIZE, np.int32)
            bounds = APPEND(bounds, jnp.int32(layer), *map(jnp.asarray, (k, page, offset)))
        touched = pages[:, :, rows, slot // SIZE].reshape(-1)
        others = np.setdiff1d(np.arange(len(whole)), touched)
        assert np.array_equal(np.asarray(bounds)[others], before[others])
    used = [pages[:, :, row, : -(-n // SIZE)].reshape(-1) for row, n in enumerate(cache.lengths)]
    used = np.concatenate(used)
    found = np.asarray(bounds)[used]
    assert np.array_equal(found[..., :2, :], whole[used][..., :2, :])  # to the last bit
    np.testing.assert_allclose(found[..., 2, :], whole[used][..., 2, :], rtol=1e-5, atol=1e-4)


def test_no_page_is_written_nowhere_and_bad_shapes_are_said():
    cache = Cache()
    bounds = cache.bounds()
    k = jnp.ones((1, KV_HEADS, DIM))
    nowhere = jnp.full((KV_HEADS, 1), 2**31 - 1, jnp.int32)
    same = append_bounds(bounds, jnp.int32(0), k, nowhere, jnp.zeros_like(nowhere))
    assert np.array_equal(np.asarray(same), np.asarray(bounds))
    with pytest.raises(ValueError, match="do not fit"):
        append_bounds(bounds, jnp.int32(0), k[:, :1], nowhere, nowhere)
    with pytest.raises(ValueError, match="rep='best'"):
        cache.scores(queries(), rep="best")
    with pytest.raises(NotImplementedError, match="gpu"):
        cache.scores(queries(), implementation="gpu")
