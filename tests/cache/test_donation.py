"""A donated pool is updated where it lies: asserted on what XLA compiled, not on what we hope."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kvjax.cache import (
    CacheConfig,
    advance,
    compact,
    copy_pages,
    fork_rows,
    grow,
    seat,
    slots_of,
    write_positions,
)
from kvjax.models.attention import paged_attend
from kvjax.models.decoder import Decoder, DecoderConfig
from kvjax.pallas_kernels.page_attention import Items, WorkList

MODEL = DecoderConfig(
    vocab_size=16, num_layers=3, embed_dim=8, mlp_dim=16, num_heads=4, num_kv_heads=2, head_dim=8,
    max_positions=64, windows=(0, 4, 0),
)  # fmt: skip
# 3 MiB of keys and values, thousands of times a step's activations.
CACHE = CacheConfig(
    num_pages=2048, page_size=4, num_layers=3, num_kv_heads=2, head_dim=8, max_rows=4,
    pages_per_row=4, track_positions=True,
)  # fmt: skip
LAYOUTS = {
    "whole": CACHE,
    "groups": dataclasses.replace(CACHE, layers_per_page=2, heads_per_page=1),
    "bfloat16": dataclasses.replace(CACHE, dtype="bfloat16"),
}
old_cpu = pytest.mark.skipif(
    jax.__version_info__ < (0, 11) and jax.default_backend() == "cpu",
    reason="on the CPU, XLA of jax 0.10 widens a bfloat16 pool to float32 for every scatter",
)
each_layout = pytest.mark.parametrize(
    "layout", ["whole", "groups", pytest.param("bfloat16", marks=old_cpu)]
)


def i32(x):
    return jnp.asarray(x, jnp.int32)


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def decoder_step(graph, params, pool, table, tokens, row):
    """One token for each of the rows, through the layer scan and the loop over items."""
    position = table.position[row]
    slots = slots_of(table, row, position, CACHE.page_size)
    pool = write_positions(pool, position, slots)
    table = advance(table, row)
    index = jnp.stack([row, 0 * row, 0 * row + CACHE.pages_per_row, row, row + 1], axis=1)
    items = Items(index=index, count=i32(len(row)), max_queries=1, max_pages=CACHE.pages_per_row)
    work = WorkList(items=(items,), pages=table.pages, length=table.length, query_position=position)
    model = nnx.merge(graph, params)
    attend = paged_attend(slots, work, MODEL.layer_windows())
    hidden, pool = model(tokens, position, pool, attend)
    return pool, table, model.logits(hidden)


def compiled_in_place(f, donate, *args):
    """Compiles f with `donate` of its arguments; asserts that they alias whole, without a copy."""
    compiled = jax.jit(f, donate_argnums=donate).lower(*args).compile()
    donated = nbytes([args[i] for i in donate])
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= donated
    assert memory.temp_size_in_bytes < nbytes(args[donate[0]].k) // 8
    return compiled


@each_layout
def test_a_step_writes_the_pool_in_place(layout):
    """Neither the scan over layers nor the loop over items inside it copies the pool."""
    pool, table = LAYOUTS[layout].init()
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), params)
    step = compiled_in_place(
        lambda pool, table, params, tokens, row: decoder_step(
            graph, params, pool, table, tokens, row
        ),
        (0, 1), pool, table, params, i32([1, 2, 3, 4]), i32([0, 1, 2, 3]),
    )  # fmt: skip
    where = pool.k.unsafe_buffer_pointer(), pool.v.unsafe_buffer_pointer()
    old = pool, table
    pool, table, _ = step(pool, table, params, i32([1, 2, 3, 4]), i32([0, 1, 2, 3]))
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert (pool.k.unsafe_buffer_pointer(), pool.v.unsafe_buffer_pointer()) == where
    with pytest.raises(RuntimeError, match="deleted"):
        old[0].k + 1


def test_the_assertions_can_fail():
    """What is not donated is not aliased; what cannot be done in place needs room for a copy."""
    pool, _ = CACHE.init()
    undonated = jax.jit(copy_pages).lower(pool, i32([0]), i32([1])).compile()
    assert undonated.memory_analysis().alias_size_in_bytes == 0
    with pytest.raises(AssertionError):
        compiled_in_place(lambda pool: dataclasses.replace(pool, k=jnp.flip(pool.k, 0)), (0,), pool)


@each_layout
def test_pages_are_copied_in_place(layout):
    pool, _ = LAYOUTS[layout].init()
    compiled_in_place(copy_pages, (0,), pool, i32([0, 1, 2]), i32([3, 4, 5000]))


@each_layout
def test_tokens_are_evicted_in_place(layout):
    pool, table = LAYOUTS[layout].init()
    keep = jnp.ones((*LAYOUTS[layout].tables, 2, 16), bool)
    compiled_in_place(compact, (0, 1), pool, table, i32([0, 2]), keep)


def test_a_fork_copies_its_pages_in_place():
    def fork(pool, table, parents, spare):
        table, source, target = fork_rows(table, parents, spare, CACHE.page_size)
        return copy_pages(pool, source, target), table

    pool, table = CACHE.init()
    compiled_in_place(fork, (0, 1), pool, table, i32([0, 0, 1, 4]), i32([[[7, 8, 9, 10]]]))


@each_layout
def test_table_operations_reuse_the_table(layout):
    _, table = LAYOUTS[layout].init()
    rows, spare = i32([0, 1]), jnp.zeros(table.length.shape, jnp.int32)
    for f, *args in (
        (lambda t, *a: seat(t, *a), rows, jnp.zeros((2, 4), jnp.int32), rows),
        (lambda t, *a: grow(t, *a), rows, rows, rows),
        (lambda t, *a: advance(t, *a), rows),
        (lambda t, *a: fork_rows(t, *a, CACHE.page_size), i32([0, 0, 1, 4]), spare),
    ):
        compiled = jax.jit(f, donate_argnums=0).lower(table, *args).compile()
        assert compiled.memory_analysis().alias_size_in_bytes >= nbytes(table)


def test_a_donation_that_xla_cannot_use_is_an_error():
    """Under the project's pytest settings; elsewhere JAX only warns.

    It is silent where a result of the same size or less has another dtype, so that a warning alone
    proves nothing: hence the assertions on the executables above.
    """
    pool, _ = CACHE.init()
    half = jax.jit(lambda pool: jax.tree.map(lambda x: x[:1024], pool), donate_argnums=0)
    with pytest.raises(UserWarning, match="donated buffers were not usable"):
        half(pool)
