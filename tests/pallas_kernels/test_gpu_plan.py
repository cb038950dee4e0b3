"""The GPU kernels' plan, on any machine: a slow walk over it must give what the reference gives.

The walk does what the kernels do, and trusts the plan where they do: tiles that are said to be
seen by all are not masked, an item that is said to be alone writes to the output.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_page_attention import items, random_cache, work_list

from kvjax.pallas_kernels.page_attention import page_attention, prepare
from kvjax.pallas_kernels.page_attention.gpu import why_not
from kvjax.pallas_kernels.page_attention.gpu_plan import Field, Mode, Shape

# float32 against float64: rounding only.
TOL = {"rtol": 1e-5, "atol": 1e-5}


def unit_keys(pool, work, plan, unit, shape, table, layer):
    """Keys, values, positions and whether each is in use, for all tiles of a unit."""
    group, heads = table
    size, num_pages, reach = plan.page_size, pool.k.shape[0], unit[Field.TILES] * shape.tile
    slot = unit[Field.FIRST_PAGE] * size + np.arange(reach)
    entry = np.minimum(slot // size, unit[Field.LAST_ENTRY])
    page = np.asarray(work.pages)[group, heads, unit[Field.ROW], entry]
    index = np.minimum(page, num_pages - 1), layer % pool.k.shape[1], slice(None), slot % size
    live = (slot < unit[Field.STOP]) & (page < num_pages)
    place = slot
    if plan.position is not None:
        place = np.asarray(plan.position)[group, heads, unit[Field.ROW], slot]
    return np.asarray(pool.k)[index], np.asarray(pool.v)[index], place, live


def softmax(scores, values):
    if not scores.size:
        return np.zeros(values.shape[-1]), -np.inf
    top = scores.max()
    weight = np.exp(scores - top)
    return weight @ values / weight.sum(), top + np.log(weight.sum())


def walk(q, pool, layer, work):
    """What the kernels compute, one row of a unit at a time."""
    plan, (_, r, c, _, d) = work.prepared, pool.k.shape
    q, position = np.asarray(q, np.float64), np.asarray(work.query_position)
    out, lse = np.full(q.shape, np.nan), np.full(q.shape[:2], np.nan)
    part = np.full((plan.max_partials, *q.shape[1:]), np.nan)
    part_lse = np.full(part.shape[:2], np.nan)
    for units in plan.classes:
        shape, slots = units.shape, np.asarray(units.slot)
        for head in range(c * work.pages.shape[1]):
            table = layer // r, head // c
            for unit in np.asarray(units.units)[*table][: int(units.count)]:
                k, v, held, live = unit_keys(pool, work, plan, unit, shape, table, layer)
                for m in range(shape.rows):
                    row = unit[Field.FIRST_ROW] + m
                    if row >= unit[Field.ROWS]:
                        continue
                    query = unit[Field.FIRST_QUERY] + row // shape.group
                    seen = live & (held <= position[query])
                    seen[: unit[Field.FULL] * shape.tile] = True
                    if position[query] < 0:
                        seen[:] = False
                    mine = head * shape.group + row % shape.group
                    scores = k[seen, head % c] @ q[query, mine] * d**-0.5
                    result = softmax(scores, v[seen, head % c])
                    if unit[Field.DIRECT]:
                        assert np.isnan(lse[query, mine])
                        out[query, mine], lse[query, mine] = result
                    else:
                        place = slots[unit[Field.PLACE] + row // shape.group]
                        assert np.isnan(part_lse[place, mine])
                        part[place, mine], part_lse[place, mine] = result
    for query, start, many in np.asarray(plan.merge)[: int(plan.num_merges)]:
        assert np.isnan(lse[query]).all()
        parts, lses = part[start : start + many], part_lse[start : start + many]
        for head in range(q.shape[1]):
            live = lses[:, head] > -np.inf
            out[query, head], lse[query, head] = softmax(lses[live, head], parts[live, head])
    return out, lse


def check(q, pool, work, layers=1, **options):
    @jax.jit
    def make(work, pool):
        return prepare(work, pool, q.shape[1], implementation="gpu", **options)

    ready, attend = make(work, pool), jax.jit(page_attention)
    for layer in range(layers):
        want, want_lse = attend(q, pool, jnp.int32(layer), work)
        out, lse = walk(q, pool, layer, ready)
        np.testing.assert_allclose(out, want, **TOL)
        np.testing.assert_allclose(lse, want_lse, **TOL)
    return ready.prepared


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("page_size", [16, 128])
def test_ragged_rows_split_at_fixed_sizes(page_size, heads):
    rng = np.random.default_rng(0)
    lengths = [1, 0, 200, 130, 256]
    pages_per_row = 256 // page_size
    _, pool, table, _, _ = random_cache(
        rng, rows=5, pages_per_row=pages_per_row, page_size=page_size, lengths=lengths, heads=heads
    )
    q = jnp.asarray(rng.normal(size=(5, 2 * heads, 8)), jnp.float32)
    split = 128 // page_size
    index = [[b, p, p + split, b, b + 1] for b in range(5) for p in range(0, pages_per_row, split)]
    work = work_list(table, [items(index, 1, split)], np.asarray(lengths) - 1)
    plan = check(q, pool, work)
    assert plan.classes[0].shape.mode is (Mode.SINGLE if heads % 2 else Mode.HEADS)
    tiles = np.asarray(plan.classes[0].units)[0, 0, : int(plan.classes[0].count), Field.TILES]
    assert list(tiles) == sorted(tiles, reverse=True) and tiles.sum() == 1 + 2 + 2 + 2


def test_rows_in_one_item_are_written_straight():
    """A chunk in two tiles, a decoding row, a padding query in a tile and one in no item."""
    rng = np.random.default_rng(1)
    _, pool, table, _, _ = random_cache(
        rng, rows=2, pages_per_row=20, page_size=16, lengths=[300, 17]
    )
    positions = [*range(240, 300), -1, 16, -1]
    q = jnp.asarray(rng.normal(size=(63, 8, 8)), jnp.float32)
    tiles = items([[0, 0, 17, 0, 32], [0, 0, 19, 32, 61]], 32, 20)
    work = work_list(table, [items([[1, 0, 2, 61, 62]], 1, 20), tiles], positions)
    plan = check(q, pool, work, max_partials=0)
    assert np.asarray(plan.merge)[: int(plan.num_merges)].tolist() == [[62, 0, 0]]
    assert plan.classes[1].shape == Shape(4, Mode.BLOCKS, 128, 1)


def test_shared_items_and_trees_go_through_partial_results():
    """A root for all, a node for some, and each row's own: in the items' order a query."""
    rng = np.random.default_rng(2)
    _, pool, table, _, _ = random_cache(
        rng, rows=3, pages_per_row=8, page_size=16, lengths=[100, 90, 128]
    )
    pages = table.pages.at[:, :, 1:, :2].set(table.pages[:, :, :1, :2])
    pages = pages.at[:, :, 2, 2:4].set(pages[:, :, 1, 2:4])
    table = dataclasses.replace(table, pages=pages)
    q = jnp.asarray(rng.normal(size=(3, 2, 8)), jnp.float32)
    shared = items([[0, 0, 2, 0, 3], [1, 2, 4, 1, 3]], 3, 2)
    own = items([[0, 2, 8, 0, 1], [1, 4, 8, 1, 2], [2, 4, 8, 2, 3]], 1, 8)
    plan = check(q, pool, work_list(table, [shared, own], [99, 89, 127]))
    many = np.asarray(plan.merge)[: int(plan.num_merges)]
    assert many.tolist() == [[0, 0, 2], [1, 2, 3], [2, 5, 3]]


def test_entries_without_a_page_and_tables_for_each_head():
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 96, size=(2, 2, 2))
    _, pool, table, _, _ = random_cache(
        rng, rows=2, pages_per_row=6, page_size=16, lengths=lengths, layers=3, layers_per_page=2,
        heads_per_page=1,
    )  # fmt: skip
    table = dataclasses.replace(table, pages=table.pages.at[0, 1, 1, 0].set(pool.k.shape[0] + 5))
    q = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)
    index = [[b, 0, 6, b, b + 1] for b in range(2)]
    plan = check(q, pool, work_list(table, [items(index, 1, 6)], [200, 200]), layers=3)
    holes = np.asarray(plan.classes[0].units)[:, :, :2, Field.HOLES]
    assert holes.sum() == 1 and holes[0, 1].any()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_random_work_lists(seed):
    """Whole batches of every kind at once."""
    rng = np.random.default_rng(seed)
    rows, lengths = 4, rng.integers(0, 256, size=4)
    _, pool, table, _, _ = random_cache(
        rng, rows=rows, pages_per_row=16, page_size=16, lengths=lengths
    )
    singles, tiles, positions = [], [], []
    for b in range(rows):
        chunk = int(rng.integers(0, 40)) if lengths[b] else 0
        chunk, first = min(chunk, int(lengths[b])), len(positions)
        positions += range(lengths[b] - chunk, lengths[b])
        split = int(rng.choice([4, 16]))
        for p in range(0, 16, split):
            if chunk == 1:
                singles.append([b, p, p + split, first, first + 1])
            tiles += [
                [b, p, p + split, t, min(t + 16, first + chunk)]
                for t in range(first, first + chunk, 16)
                if chunk > 1
            ]
    positions += [-1] * 3
    q = jnp.asarray(rng.normal(size=(len(positions), 14, 8)), jnp.float32)
    work = work_list(table, [items(singles, 1, 16), items(tiles, 16, 16)], positions)
    check(q, pool, work)


@pytest.mark.parametrize("queries", [1, 24])
def test_true_positions_with_gaps_and_dead_slots(queries):
    """Rows from which a third was evicted, some slots of it in place; dead ones are NaN."""
    rng = np.random.default_rng(0)
    lengths = [200, 0, 130, 256]
    _, pool, table, _, _ = random_cache(
        rng, rows=4, pages_per_row=16, page_size=16, lengths=lengths, track_positions=True
    )
    plane = np.full(pool.position.shape, -1)
    last = np.zeros(4, int)
    for b, length in enumerate(lengths):
        position = np.sort(rng.choice(3 * length // 2, length, replace=False))
        position[rng.random(length) < 0.03] = -1
        position[:130] = np.arange(min(length, 130))  # whole tiles that everyone sees
        pages = np.asarray(table.pages)[0, 0, b]
        for slot, place in enumerate(position):
            plane[pages[slot // 16], slot % 16] = place
        last[b] = position.max(initial=-1)
    dead = jnp.asarray(plane < 0)[:, None, None, :, None]
    k, v = (jnp.where(dead, jnp.nan, x) for x in (pool.k, pool.v))
    pool = dataclasses.replace(pool, k=k, v=v, position=jnp.asarray(plane, jnp.int32))
    first = np.arange(4) * queries
    index = [[b, p, p + 8, first[b], first[b] + queries] for b in range(4) for p in (0, 8)]
    positions = np.maximum(last[:, None] - queries + 1 + np.arange(queries), -1).reshape(-1)
    q = jnp.asarray(rng.normal(size=(4 * queries, 4, 8)), jnp.float32)
    plan = check(q, pool, work_list(table, [items(index, queries, 8)], positions))
    (units,) = plan.classes
    full, holes = (np.asarray(units.units)[..., x] for x in (Field.FULL, Field.HOLES))
    assert full.any() and holes.any() and not holes.all()


def test_a_plan_is_made_for_one_way_of_calling():
    rng = np.random.default_rng(0)
    _, pool, table, _, _ = random_cache(rng, rows=1, pages_per_row=2, page_size=16, lengths=[20])
    pool = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pool)
    pool = dataclasses.replace(pool, **{n: jnp.tile(getattr(pool, n), 8) for n in "kv"})
    work = work_list(table, [items([[0, 0, 2, 0, 1]], 1, 2)], [19])
    ready = jax.jit(lambda: prepare(work, pool, 8, implementation="gpu"))()
    q = jnp.ones((1, 4, 64), jnp.bfloat16)
    if jax.__version_info__ >= (0, 11):
        with pytest.raises(ValueError, match="prepared for"):
            page_attention(q, pool, jnp.int32(0), ready, implementation="gpu")
    with pytest.raises(NotImplementedError, match="the GPU kernels"):
        wrong = q.astype(jnp.float32)
        page_attention(wrong, pool, jnp.int32(0), work, implementation="gpu")


def test_the_default_on_a_cpu_is_the_reference():
    rng = np.random.default_rng(0)
    _, pool, table, _, _ = random_cache(rng, rows=1, pages_per_row=2, page_size=16, lengths=[20])
    work = work_list(table, [items([[0, 0, 2, 0, 1]], 1, 2)], [19])
    if jax.default_backend() == "cpu":
        assert prepare(work, pool, 4) is work
    assert "bfloat16" in why_not(pool, 4, jnp.float32) or jax.__version_info__ < (0, 11)
