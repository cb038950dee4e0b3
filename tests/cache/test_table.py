"""The table's operations on cases that a reader checks by eye, eager and jitted with donation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import (
    CacheConfig,
    PageTable,
    advance,
    copy_pages,
    fork_rows,
    grow,
    seat,
    slots_of,
    write,
)

NOWHERE = np.iinfo(np.int32).max
# 9 pages of 4 tokens, 4 rows of up to 3 pages: the entry 9 means no page.
CONFIG = CacheConfig(
    num_pages=9, page_size=4, num_layers=1, num_kv_heads=2, head_dim=2, max_rows=4, pages_per_row=3
)
GROUPED = dataclasses.replace(CONFIG, num_layers=2, layers_per_page=1, heads_per_page=1)


def i32(x):
    return jnp.asarray(x, jnp.int32)


def table_of(pages, length, position=None):
    """A table of one layer and head group."""
    position = length if position is None else position
    return PageTable(pages=i32([[pages]]), length=i32([[length]]), position=i32(position))


def rows_of(table):
    """Pages, lengths and positions of a table of one group, as lists; anything from 9 on is 9."""
    pages = np.minimum(np.asarray(table.pages[0, 0]), 9)
    return pages.tolist(), table.length[0, 0].tolist(), table.position.tolist()


def test_seat_gives_rows_a_prefix_and_drops_padding(run):
    _, table = GROUPED.init()
    table = run(seat)(table, i32([2, 0, 4, 99]), i32([[5, 9, 9], [1, 2, 9], [3, 3, 3], [3, 3, 3]]),
                      i32([3, 7, 1, 1]))  # fmt: skip
    for g, h in np.ndindex(2, 2):
        assert table.pages[g, h].tolist() == [[1, 2, 9], [9, 9, 9], [5, 9, 9], [9, 9, 9]]
        assert table.length[g, h].tolist() == [7, 0, 3, 0]
    assert table.position.tolist() == [7, 0, 3, 0]


def test_grow_sets_single_entries_and_drops_padding(run):
    _, table = GROUPED.init()
    table = run(grow)(table, i32([1, 1, 2, 4, 0]), i32([0, 2, 1, 0, 3]), i32([7, 8, 6, 5, 5]))
    for g, h in np.ndindex(2, 2):
        assert table.pages[g, h].tolist() == [[9, 9, 9], [7, 9, 8], [9, 6, 9], [9, 9, 9]]
    assert not np.any(table.length) and not np.any(table.position)


def test_advance_counts_tokens_per_row_and_drops_padding(run):
    table = table_of([[9] * 3] * 4, [3, 0, 5, 0], [10, 0, 5, 0])
    table = run(advance)(table, i32([0, 2, 0, 4, 0, 100]))
    assert rows_of(table)[1:] == ([6, 0, 6, 0], [13, 0, 6, 0])


def places(slots):
    """(page, offset) of each token in group 0; a page from 9 on is None: it is dropped."""
    pairs = zip(slots.page[0, 0].tolist(), slots.offset[0, 0].tolist(), strict=True)
    return [(page, offset) if page < 9 else None for page, offset in pairs]


def slots_at(table, row, position):
    return slots_of(table, i32(row), i32(position), page_size=4)


def test_slots_follow_the_row_across_a_page_boundary():
    table = table_of([[4, 6, 9], [2, 9, 9], [9] * 3, [0, 1, 3]], [2, 4, 0, 8])
    slots = slots_at(table, [0, 0, 0, 0, 3], [2, 3, 4, 5, 8])
    assert places(slots) == [(4, 2), (4, 3), (6, 0), (6, 1), (3, 0)]


def test_slots_without_a_page_are_dropped():
    """A missing entry, an entry from another pool's end, padding rows."""
    table = table_of([[4, 9, 9], [NOWHERE, 9, 9], [9] * 3, [1, 2, 3]], [4, 0, 0, 0])
    slots = slots_at(table, [0, 1, 2, 4, 99], [4, 0, 0, 0, 0])
    assert places(slots) == [None] * 5


def test_slots_beyond_the_row_are_dropped_and_not_clamped():
    """The row is full at 12 tokens: token 12 must not land on the live token 8, nor 11."""
    table = table_of([[4, 6, 7]] + [[9] * 3] * 3, [11, 0, 0, 0])
    slots = slots_at(table, [0, 0, 0, 0], [11, 12, 13, 40])
    assert places(slots) == [(7, 3), None, None, None]


def test_slots_count_from_the_length_where_tokens_were_evicted():
    table = table_of([[4, 6, 9], [9] * 3, [9] * 3, [9] * 3], [3, 0, 0, 0], [20, 0, 0, 0])
    assert places(slots_at(table, [0, 0], [20, 21])) == [(4, 3), (6, 0)]


def test_slots_differ_by_group():
    """Four groups of one row, which hold different pages and lengths."""
    pages = np.full((2, 2, 4, 3), 9)
    pages[0, 0, 0], pages[0, 1, 0] = [1, 2, 9], [3, 9, 9]
    pages[1, 0, 0], pages[1, 1, 0] = [4, 5, 6], [9, 9, 9]
    length = np.zeros((2, 2, 4))
    length[:, :, 0] = [[4, 1], [10, 0]]
    table = PageTable(pages=i32(pages), length=i32(length), position=i32([30, 0, 0, 0]))
    slots = slots_at(table, [0], [30])
    assert slots.page[:, :, 0].tolist() == [[2, 3], [6, 9]]
    assert slots.offset[:, :, 0].tolist() == [[0, 1], [2, 0]]


def test_a_full_row_keeps_its_tokens_when_more_are_written():
    pool, _ = CONFIG.init()
    pool = dataclasses.replace(pool, k=pool.k + 1, v=pool.v + 1)
    table = table_of([[4, 6, 7]] + [[9] * 3] * 3, [12, 0, 0, 0])
    token = jnp.full((2, 2, 2), 5.0)
    slots = slots_at(table, [0, 0], [12, 13])
    np.testing.assert_array_equal(write(pool, i32(0), token, token, slots).k, pool.k)


# Forking.

fork = functools.partial(fork_rows, page_size=4)
PARENTS = table_of([[0, 1, 9], [2, 9, 9], [3, 4, 5], [9, 9, 9]], [6, 4, 11, 0], [6, 4, 30, 0])


def forked(run, parents, table=PARENTS, spare=(6, 7, 8, 9)):
    """Rows after a fork, and the copies in use as (source, target)."""
    table = jax.tree.map(jnp.copy, table)  # the fixture is donated
    table, source, target = run(fork)(table, i32(parents), i32([[spare]]))
    pairs = zip(source.tolist(), target.tolist(), strict=True)
    return *rows_of(table), [pair for pair in pairs if pair[1] < 9]


def test_a_row_that_is_its_own_parent_keeps_its_pages(run):
    assert forked(run, [0, 1, 2, 3]) == (*rows_of(PARENTS), [])


def test_parents_from_b_on_empty_the_row(run):
    table = table_of([[0, 1, 9], [2, 9, 9], [3, 4, 5], [6, 9, 9]], [6, 4, 11, 3], [6, 4, 30, 3])
    pages, length, position, copies = forked(run, [4, 1, 99, 4], table, spare=(7, 8, 9, 9))
    assert pages == [[9] * 3, [2, 9, 9], [9] * 3, [9] * 3]
    assert (length, position, copies) == ([0, 4, 0, 0], [0, 4, 0, 0], [])


def test_a_partly_filled_page_is_copied(run):
    """Rows 1 and 3 become row 0: page 0 is shared, page 1 copied once for each."""
    pages, length, position, copies = forked(run, [0, 0, 2, 0], spare=[9, 7, 9, 8])
    assert pages == [[0, 1, 9], [0, 7, 9], [3, 4, 5], [0, 8, 9]]
    assert (length, position) == ([6, 6, 11, 6], [6, 6, 30, 6])
    assert copies == [(1, 7), (1, 8)]


def test_an_exactly_full_page_is_shared_without_a_copy(run):
    pages, length, position, copies = forked(run, [1, 1, 2, 1])
    assert pages == [[2, 9, 9], [2, 9, 9], [3, 4, 5], [2, 9, 9]]
    assert (length, position, copies) == ([4, 4, 11, 4], [4, 4, 30, 4], [])


def test_an_exactly_full_row_is_shared_without_a_copy(run):
    table = table_of([[3, 4, 5], [9] * 3, [9] * 3, [9] * 3], [12, 0, 0, 0])
    pages, length, _, copies = forked(run, [0, 0, 3, 3], table)
    assert pages[:2] == [[3, 4, 5]] * 2 and length[:2] == [12, 12] and copies == []


def test_rows_change_places(run):
    """A permutation reads all parents before it writes any row."""
    pages, length, position, copies = forked(run, [2, 0, 1, 0], spare=[6, 7, 9, 8])
    assert pages == [[3, 4, 6], [0, 7, 9], [2, 9, 9], [0, 8, 9]]
    assert (length, position) == ([11, 6, 4, 6], [30, 6, 4, 6])
    assert copies == [(5, 6), (1, 7), (1, 8)]


def test_an_empty_parent_makes_an_empty_row(run):
    pages, length, position, copies = forked(run, [3, 1, 2, 3])
    assert (pages[0], length[0], position[0], copies) == ([9] * 3, 0, 0, [])


def test_pages_set_aside_for_the_parent_are_not_shared(run):
    """Entries beyond the last token hold nobody's tokens yet: only one row may write there."""
    table = table_of([[0, 1, 2], [3, 4, 9], [9] * 3, [9] * 3], [2, 4, 0, 0])
    pages, _, _, copies = forked(run, [0, 1, 0, 1], table)
    assert pages == [[0, 1, 2], [3, 4, 9], [8, 9, 9], [3, 9, 9]]
    assert copies == [(0, 8)]


def test_groups_fork_by_their_own_lengths(run):
    """Of four groups those with a partly filled page copy it; the copies come in group order."""
    pages = np.full((2, 2, 4, 3), 9)
    pages[:, :, 0, 0], pages[:, :, 0, 1] = [[0, 1], [2, 3]], [[9, 4], [9, 9]]
    length = np.zeros((2, 2, 4), np.int32)
    length[:, :, 0] = [[4, 5], [0, 3]]
    table = PageTable(pages=i32(pages), length=i32(length), position=i32([9, 0, 0, 0]))
    spare = np.full((2, 2, 4), 9)
    spare[:, :, 1] = [[5, 6], [7, 8]]
    table, source, target = run(fork)(table, i32([0, 0, 2, 3]), i32(spare))
    got = np.minimum(table.pages[:, :, 1], 9).tolist()
    assert got == [[[0, 9, 9], [1, 6, 9]], [[9, 9, 9], [8, 9, 9]]]
    assert table.length[:, :, 1].tolist() == [[4, 5], [0, 3]]
    used = [(s, t) for s, t in zip(source.tolist(), target.tolist(), strict=True) if t < 9]
    assert used == [(4, 6), (3, 8)]
    assert table.position.tolist() == [9, 9, 0, 0]


def test_forked_rows_part_ways_in_the_pool(run):
    """Fork, copy, then write one token in each: the parent's page holds its own token only."""
    pool, _ = CONFIG.init()
    pool = dataclasses.replace(pool, k=pool.k.at[1, 0, :, :2].set(3.0), v=pool.v + 1)
    table, source, target = fork(PARENTS, i32([0, 0, 2, 3]), i32([[[9, 7, 9, 9]]]))
    pool = run(copy_pages)(pool, source, target)
    token = jnp.broadcast_to(jnp.array([5.0, 6.0])[:, None, None], (2, 2, 2))
    pool = write(pool, i32(0), token, token, slots_at(table, [0, 1], [6, 6]))
    assert pool.k[1, 0, 0, :, 0].tolist() == [3, 3, 5, 0]
    assert pool.k[7, 0, 0, :, 0].tolist() == [3, 3, 6, 0]
