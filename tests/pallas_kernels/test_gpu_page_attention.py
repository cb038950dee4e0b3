"""The GPU kernels of page_attention on a Hopper GPU, against the reference, which is float32.

Rows of random lengths, one of them empty, in pages in random order; slots that are not in use are
NaN. Elsewhere these tests skip; `test_gpu_plan.py` has what needs no GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_page_attention import items

from kvjax.cache import KVPool
from kvjax.pallas_kernels.devices import on_hopper
from kvjax.pallas_kernels.page_attention import WorkList, page_attention, prepare

ROWS = 9


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")]


def decoding(rng, lengths, pages, split, tile):
    """Every row one query, in items of `split` pages."""
    longest = pages.shape[-1]
    index = [[b, p, p + split, b, b + 1] for b in range(ROWS) for p in range(0, longest, split)]
    return [items(index, 1, split)], lengths.max(axis=(0, 1)) - 1


def chunks(rng, lengths, pages, split, tile):
    """Every row its last tokens, one of them and two behind all of them padding."""
    lengths[:] = lengths[:, :1]
    index, positions = [], []
    for b, length in enumerate(lengths[0, 0]):
        n, first = min(int(length), int(rng.choice([1, 5, 32, 77, 130]))), len(positions)
        positions += range(length - n, length)
        index += [
            [b, p, p + split, first + t, first + min(t + tile, n)]
            for t in range(0, n, tile)
            for p in range(0, pages.shape[-1], split)
        ]
    positions[3] = -1
    return [items(index, tile, split)], [*positions, -1, -1]


def tree(rng, lengths, pages, split, tile):
    """A root of two items for all rows, a node for some of them, and each row's own pages."""
    size = 1600 // pages.shape[-1]
    root, node = 512 // size, 768 // size
    lengths[:] = np.maximum(lengths, 1000)
    pages[..., :root] = pages[:, :, 2:3, :root]
    pages[:, :, 5:, root:node] = pages[:, :, 6:7, root:node]
    shared = [[2, 0, root // 2, 0, ROWS], [2, root // 2, root, 0, ROWS], [6, root, node, 5, ROWS]]
    own = [[b, root if b < 5 else node, pages.shape[-1], b, b + 1] for b in range(ROWS)]
    positions = lengths.max(axis=(0, 1)) - 1
    return [items(shared, ROWS, root // 2), items(own, 1, pages.shape[-1])], positions


def batch(kind, *, page_size=16, dim=128, kv_heads=8, group=4, layers=2, per_page=None, tile=32,
          longest=1600, split=512, holes=(), tracked=False):  # fmt: skip
    rng = np.random.default_rng(0)
    per_page = per_page or kv_heads
    groups, entries = kv_heads // per_page, longest // page_size
    lengths = rng.integers(1, longest, size=(1, groups, ROWS))
    lengths[..., :3] = 0, 1, longest
    num_pages = groups * ROWS * entries + 5
    pages = rng.permutation(num_pages)[: groups * ROWS * entries].astype(np.int32)
    pages = pages.reshape(1, groups, ROWS, entries)
    work_items, positions = kind(rng, lengths, pages, split // page_size, tile)
    plane = np.full((num_pages, page_size), -1)
    for heads in range(groups):
        for b, length in enumerate(lengths[0, heads]):
            slot = np.arange(length)
            place = slot
            if tracked:  # gaps everywhere, and dead slots among the later ones
                place = np.where((slot > 700) & (rng.random(length) < 0.1), -1, 2 * slot + b % 2)
            plane[pages[0, heads, b, slot // page_size], slot % page_size] = place
    dead = plane < 0
    if tracked:
        positions = np.where(np.asarray(positions) < 0, -1, 2 * np.asarray(positions))
    shape = (num_pages, layers, per_page, page_size, dim)
    k, v = (np.where(dead[:, None, None, :, None], np.nan, rng.normal(size=shape)) for _ in "kv")
    for hole in holes:
        pages[(0, 0, *hole)] = num_pages
    work = WorkList(
        items=tuple(work_items), pages=jnp.asarray(pages),
        length=jnp.asarray(lengths, jnp.int32), query_position=jnp.asarray(positions, jnp.int32),
    )  # fmt: skip
    pool = KVPool(
        k=jnp.asarray(k, jnp.bfloat16), v=jnp.asarray(v, jnp.bfloat16),
        position=jnp.asarray(plane, jnp.int32) if tracked else None,
    )  # fmt: skip
    shape = (len(positions), kv_heads * group, dim)
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16), pool, work


@pytest.mark.parametrize(
    "kind, sizes, options",
    [
        (decoding, {}, {}),
        (decoding, {"dim": 64, "page_size": 64}, {}),
        (decoding, {"page_size": 128, "longest": 1664, "split": 128}, {}),
        (decoding, {"page_size": 8, "group": 1}, {}),
        (decoding, {"group": 16, "kv_heads": 2}, {}),
        (decoding, {"group": 7, "kv_heads": 4}, {"window": 300}),
        (decoding, {"kv_heads": 2, "per_page": 1}, {}),
        (decoding, {"holes": ((2, 3), (3, 4), (3, 5))}, {}),
        (chunks, {}, {}),
        (chunks, {"dim": 64}, {}),
        (chunks, {"page_size": 64, "tile": 64, "longest": 1664}, {"window": 100}),
        (chunks, {"group": 1}, {"soft_cap": 5.0}),
        (chunks, {"group": 7, "kv_heads": 4, "split": 1600}, {}),
        (chunks, {"group": 2, "kv_heads": 3}, {}),
        (decoding, {"dim": 96}, {}),
        (chunks, {"dim": 80, "layers": 1}, {}),
        (tree, {"dim": 256, "layers": 1}, {}),
        (tree, {"layers": 1}, {}),
        (tree, {"layers": 1, "group": 8}, {}),
        (decoding, {"tracked": True}, {}),
        (decoding, {"tracked": True, "dim": 64, "per_page": 1, "kv_heads": 2}, {"window": 900}),
        (chunks, {"tracked": True, "page_size": 64, "longest": 1664}, {"window": 200}),
        (tree, {"tracked": True, "layers": 1}, {}),
    ],
)
def test_against_the_reference(kind, sizes, options):
    q, pool, work = batch(kind, **sizes)
    if "window" in options:
        options = {"window": jnp.int32(options["window"])}
    attend, reference = (
        jax.jit(functools.partial(page_attention, implementation=name, **options))
        for name in ("gpu", "reference")
    )
    for layer in range(pool.k.shape[1]):
        out, lse = attend(q, pool, jnp.int32(layer), work)
        want, want_lse = reference(q, pool, jnp.int32(layer), work)
        out, want = (np.asarray(x, np.float64) for x in (out, want))
        # bfloat16 weights and outputs: 2 ** -9 each, averaged over the keys.
        assert np.linalg.norm(out - want) < 5e-3 * np.linalg.norm(want)
        # float32 sums of products that are exact in float32.
        np.testing.assert_allclose(lse, want_lse, rtol=1e-4, atol=1e-4)


def test_a_result_does_not_depend_on_the_batch():
    """The same row alone, with others, and with its plan made before: equal to the last bit."""
    q, pool, work = batch(decoding)
    attend = jax.jit(functools.partial(page_attention, implementation="gpu"))
    ready = jax.jit(functools.partial(prepare, num_heads=32, implementation="gpu"))(work, pool)
    (all_items,) = work.items
    own = np.flatnonzero(np.asarray(all_items.index)[:, 0] == 4)
    alone = dataclasses.replace(
        work, items=(items(np.asarray(all_items.index)[own], 1, all_items.max_pages),)
    )
    out, lse = attend(q, pool, jnp.int32(1), work)
    for other in (ready, alone):
        again, lse_again = attend(q, pool, jnp.int32(1), other)
        np.testing.assert_array_equal(out[4], again[4])
        np.testing.assert_array_equal(lse[4], lse_again[4])
