"""Random forks, appends and truncations of a decoder's branches against a dense recompute."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import (
    Branch,
    CacheConfig,
    OutOfPages,
    PageLedger,
    PrefixTrie,
    advance,
    copy_pages,
    grow,
    seat,
    slots_of,
)
from kvjax.models.attention import causal_attend, paged_attend
from kvjax.models.decoder import Decoder, DecoderConfig
from kvjax.pallas_kernels.page_attention import Items, WorkList

pytestmark = pytest.mark.slow

ROWS, CHUNK, MAX_LENGTH, SIZE = 4, 5, 24, 4
MODEL = DecoderConfig(
    vocab_size=7, num_layers=2, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8,
    max_positions=MAX_LENGTH, windows=(0, 6), qkv_bias=True, qk_norm=True,
)  # fmt: skip
# 12 pages for 4 rows of up to 6: sometimes too few, so that pages are evicted and appends refused.
CACHE = CacheConfig(
    num_pages=12, page_size=SIZE, num_layers=2, num_kv_heads=2, head_dim=8, max_rows=ROWS,
    pages_per_row=MAX_LENGTH // SIZE,
)  # fmt: skip
# float32 through two layers, summed in another order by pages than densely: differences of 1e-6
# on logits of order 1, two orders of magnitude of room. A wrong token or page moves them by 0.1.
TOL = {"rtol": 1e-4, "atol": 1e-4}


def i32(x):
    return jnp.asarray(x, jnp.int32)


@functools.cache
def model():
    """A decoder and random weights, norms and biases among them; no initialiser is compiled."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def weights(path, x):
        centre = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + 0.3 * rng.normal(size=x.shape), x.dtype)

    return graph, jax.tree_util.tree_map_with_path(weights, shapes)


@jax.jit
def dense(params, tokens):
    """Logits [B, S, V] of whole sequences."""
    decoder = nnx.merge(model()[0], params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    attend = causal_attend(MODEL.layer_windows())
    return decoder.logits(decoder(tokens, positions, None, attend)[0])


@jax.jit
def pour_nan(pool, live):
    """NaN into all slots that are not live, bool[N, P]."""
    live = live[:, None, None, :, None]
    return dataclasses.replace(
        pool, k=jnp.where(live, pool.k, jnp.nan), v=jnp.where(live, pool.v, jnp.nan)
    )


@functools.partial(jax.jit, donate_argnums=(1, 2))
def step(params, pool, table, plan):
    """Copies, new table entries, then the tokens of all rows at once; logits float32[T, V]."""
    pool = copy_pages(pool, plan["source"], plan["target"])
    table = seat(table, plan["seat_row"], plan["seat_pages"], plan["seat_length"])
    table = grow(table, plan["grow_row"], plan["grow_index"], plan["grow_page"])
    slots = slots_of(table, plan["write_row"], plan["position"], SIZE)
    table = advance(table, plan["write_row"])
    items = Items(
        index=plan["items"], count=i32(ROWS), max_queries=CHUNK, max_pages=CACHE.pages_per_row
    )
    work = WorkList(
        items=(items,), pages=table.pages, length=table.length, query_position=plan["position"]
    )
    decoder = nnx.merge(model()[0], params)
    attend = paged_attend(slots, work, MODEL.layer_windows())
    # Padding has the position -1, which is nobody's; its outputs are not read.
    hidden, pool = decoder(plan["tokens"], jnp.maximum(plan["position"], 0), pool, attend)
    return pool, table, decoder.logits(hidden)


class Host:
    """What an engine does for its branches, one per row, with fixed shapes for the device.

    Two pools go through the same steps; into one of them NaN is poured before each.
    """

    def __init__(self):
        self.trie = PrefixTrie(PageLedger(CACHE.num_pages), SIZE)
        self.branches = [Branch() for _ in range(ROWS)]
        self.findable = set()  # full pages, which outlive their branches until they are evicted
        forget = self.trie.ledger.on_evict
        self.trie.ledger.on_evict = lambda page: (self.findable.discard(page), forget(page))
        self.pools = [CACHE.init()[0] for _ in range(2)]
        self.tables = [CACHE.init()[1] for _ in range(2)]
        self.moved = set(range(ROWS))  # rows whose table entries are to be set anew

    def fork(self, parent, row):
        if parent != row:
            self.trie.release(self.branches[row])
            self.branches[row] = self.trie.fork(self.branches[parent])
            self.moved.add(row)

    def truncate(self, row, length):
        branch = self.branches[row]
        self.trie.truncate(branch, min(length, len(branch)))
        self.moved.add(row)

    def live_slots(self):
        live = np.zeros((CACHE.num_pages, SIZE), bool)
        live[sorted(self.findable)] = True
        for branch in self.branches:
            for i in range(len(branch)):
                live[branch.pages[i // SIZE], i % SIZE] = True
        return jnp.asarray(live)

    def append(self, new_tokens):
        """One step: row b gets `new_tokens[b]`, none if empty, and its last token's logits.

        Tokens that were found in pages are not computed again, but each row's last one always is.
        """
        live = self.live_slots()
        self.pools[1] = pour_nan(self.pools[1], live)
        n, none = ROWS * CHUNK, CACHE.num_pages
        plan = {
            "source": np.zeros(ROWS), "target": np.full(ROWS, none),
            "seat_row": np.full(ROWS, ROWS), "seat_length": np.zeros(ROWS),
            "seat_pages": np.full((ROWS, CACHE.pages_per_row), none),
            "grow_row": np.full(3 * ROWS, ROWS), "grow_index": np.zeros(3 * ROWS),
            "grow_page": np.zeros(3 * ROWS),
            "tokens": np.zeros(n), "position": np.full(n, -1), "write_row": np.full(n, ROWS),
            "items": np.zeros((ROWS, 5)),
        }  # fmt: skip
        for row, tokens in enumerate(new_tokens):
            self.plan_row(plan, row, tokens)
        plan = {name: i32(x) for name, x in plan.items()}
        logits = []
        for i in range(2):
            self.pools[i], self.tables[i], out = step(
                model()[1], self.pools[i], self.tables[i], plan
            )
            logits.append(np.asarray(out))
        self.moved = set()
        return logits, [row * CHUNK + CHUNK - 1 for row in range(ROWS)]

    def plan_row(self, plan, row, tokens):
        branch = self.branches[row]
        length = len(branch)
        tokens, matched = tokens[: MAX_LENGTH - length], 0
        old = list(branch.pages)
        try:
            extension = self.trie.extend(branch, tokens)
        except OutOfPages:
            tokens = []
        else:
            matched = extension.matched
            for source, target in extension.copies:
                plan["source"][row], plan["target"][row] = source, target
        self.findable |= set(branch.pages[: len(branch) // SIZE])
        changed = branch.pages[: len(old)] != old  # a copied page, or one that was found
        if matched or changed or row in self.moved:
            plan["seat_row"][row], plan["seat_length"][row] = row, length + matched
            plan["seat_pages"][row, : len(branch.pages)] = branch.pages
        else:
            for i in range(len(old), len(branch.pages)):
                at = 3 * row + i - len(old)
                plan["grow_row"][at], plan["grow_index"][at] = row, i
                plan["grow_page"][at] = branch.pages[i]
        # The row's queries stand at the end of its chunk: the last one always is a real token.
        start = length + matched
        first = min(start, max(len(branch) - 1, 0))
        end = (row + 1) * CHUNK
        begin = end - (len(branch) - first)
        plan["tokens"][begin:end] = branch.tokens[first:]
        plan["position"][begin:end] = np.arange(first, len(branch))
        plan["write_row"][end - (len(branch) - start) : end] = row
        plan["items"][row] = row, 0, CACHE.pages_per_row, begin, end


def check(host, logits, last):
    """Logits of each branch's last token: as dense, and to the bit the same beside NaN."""
    clean, poured = logits
    tokens = np.zeros((ROWS, MAX_LENGTH), np.int32)
    for row, branch in enumerate(host.branches):
        tokens[row, : len(branch)] = branch.tokens
    want = np.asarray(dense(model()[1], jnp.asarray(tokens)))
    for row, branch in enumerate(host.branches):
        if len(branch):
            np.testing.assert_allclose(clean[last[row]], want[row, len(branch) - 1], **TOL)
            np.testing.assert_array_equal(clean[last[row]], poured[last[row]])
    lengths = [len(branch) for branch in host.branches]
    for table in host.tables:
        assert table.length[0, 0].tolist() == table.position.tolist() == lengths


# Two tokens only, so that branches meet again and find each other's pages.
CHUNKS = st.lists(
    st.lists(st.integers(1, 2), max_size=CHUNK), min_size=ROWS, max_size=ROWS
)  # fmt: skip
ROW = st.integers(0, ROWS - 1)
LENGTH = st.integers(0, MAX_LENGTH) | st.sampled_from([0, SIZE, 2 * SIZE])
EDIT = st.tuples(st.just("fork"), ROW, ROW) | st.tuples(st.just("truncate"), ROW, LENGTH)
ROUND = st.tuples(st.lists(EDIT, max_size=3), CHUNKS)


@settings(deadline=None, derandomize=True, max_examples=60, database=None)
@given(st.lists(ROUND, min_size=3, max_size=10))
def test_branches_are_as_if_each_were_computed_alone(program):
    host = Host()
    for edits, chunks in program:
        for name, *args in edits:
            getattr(host, name)(*args)
        check(host, *host.append(chunks))
    for branch in host.branches:
        host.trie.release(branch)
    assert host.trie.ledger.held == 0
    assert step._cache_size() == 1  # one compilation for everything above
