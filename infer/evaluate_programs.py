"""The device programs of `kvjax eval`: one prefill, and what each policy makes of its cache.

The rows of a batch share nothing. Every layer and KV head of a row has pages of its own (R = C =
1), so that any policy can keep what it wants; what it frees is free. Letters as in
`kvjax.cache.pool`; T tokens of a prompt, X of a question, W of an answer at most.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.cache import CacheConfig, KVPool, PageTable, advance, slots_of, write, write_positions
from kvjax.models.attention import paged_attend, reading_attend
from kvjax.models.decoder import Attend, Decoder, DecoderConfig
from kvjax.pallas_kernels.page_attention import Items, WorkList
from kvjax.pallas_kernels.page_bounds import rebuild_bounds
from kvjax.select import Evicted, MPCache, Observation, Policy, Read, View, evict, pages_held

__all__ = [
    "Choice",
    "Prefilled",
    "Reading",
    "Sizes",
    "answer",
    "choose",
    "extend",
    "prefill",
    "read_question",
    "remove",
]

Array = jax.Array

_BLOCK_QUERIES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The static sizes of a batch.

    Attributes:
        rows: B.
        prompt: T, the longest prompt.
        question: X, the longest question that is read after the compression; 0: none is.
        answer: W, the most tokens of an answer.
        page_size: P.
        observed: A, how many of the last queries are recorded; -1: all.
    """

    rows: int
    prompt: int
    question: int
    answer: int
    page_size: int
    observed: int

    @property
    def spare(self) -> int:
        """Pages that a row needs for its question and answer."""
        return -(-(self.question + self.answer) // self.page_size) + 1

    def cache(self, model: DecoderConfig) -> CacheConfig:
        """The cache that holds all rows whole."""
        pages = -(-self.prompt // self.page_size) + self.spare
        return CacheConfig(
            num_pages=model.num_layers * model.num_kv_heads * self.rows * pages,
            page_size=self.page_size, num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, max_rows=self.rows,
            pages_per_row=pages, layers_per_page=1, heads_per_page=1, dtype=model.dtype,
            track_positions=True,
        )  # fmt: skip


class Prefilled(NamedTuple):
    """A batch after its prefill.

    Attributes:
        pool: the pages.
        table: the rows.
        seen: the queries that were recorded.
        token: int32[B], the likeliest first token of an answer.
    """

    pool: KVPool
    table: PageTable
    seen: Observation
    token: Array


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the steps of an answer read less than the whole cache; static.

    Attributes:
        policy: which pages.
        width: how many there is room for.
    """

    policy: MPCache
    width: int


class Choice(NamedTuple):
    """What a policy keeps, and what that means before anything is removed.

    Attributes:
        keep: bool[L, K, B, S].
        recall: float32[B], the share of the needles' tokens that stay, over layers and heads.
        error: float32[B], how far the last query's attention is from that to the whole cache,
            norm of the difference over the norm, the mean over layers and heads.
    """

    keep: Array
    recall: Array
    error: Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
    graph: nnx.GraphDef[Any], sizes: Sizes, params: Any, tokens: Array, length: Array
) -> Prefilled:
    """Computes whole prompts, exactly, into a new pool.

    Args:
        graph: of the decoder; static.
        sizes: static.
        params: of the decoder.
        tokens: int32[B, T], padded at the end.
        length: int32[B].
    """
    decoder = nnx.merge(graph, params)
    config = decoder.config
    cache = sizes.cache(config)
    pool, table = cache.init()
    pages = jnp.arange(cache.num_pages, dtype=jnp.int32).reshape(table.pages.shape)
    table = dataclasses.replace(table, pages=pages)
    place = jnp.arange(sizes.prompt, dtype=jnp.int32)[None]
    row = jnp.arange(sizes.rows, dtype=jnp.int32)[:, None]
    row = jnp.where(place < length[:, None], row, sizes.rows).reshape(-1)
    positions = jnp.broadcast_to(place, tokens.shape)
    slots = slots_of(table, row, positions.reshape(-1), sizes.page_size)
    pool = write_positions(pool, positions.reshape(-1), slots)
    count = sizes.prompt if sizes.observed < 0 else min(sizes.observed, sizes.prompt)
    shape = (config.num_layers, sizes.rows, count, config.num_heads, config.head_dim)
    state = pool, jnp.zeros(shape, jnp.dtype(config.dtype)), jnp.zeros(shape[:-1], jnp.float32)
    last = length[:, None] - count + jnp.arange(count, dtype=jnp.int32)[None]  # [B, A]
    attend = _observing_attend(slots, jnp.maximum(last, 0), config.layer_windows())
    hidden, (pool, q, lse) = decoder(tokens, positions, state, attend)
    table = advance(table, row)
    final = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    seen = Observation(q=q, lse=lse, position=jnp.maximum(last, -1))
    return Prefilled(pool, table, seen, _likeliest(decoder, final))


def _observing_attend(slots: Any, last: Array, windows: Array | None) -> Attend:
    """Attention of whole prompts to themselves, which writes pages and records queries.

    The state is (pool, queries [L, B, A, H, D], lse [L, B, A, H]).
    """

    def attend(layer: Array, q: Array, k: Array, v: Array, state: tuple) -> tuple[Array, tuple]:
        pool, queries, sums = state
        flat_k, flat_v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        pool = write(pool, layer, flat_k, flat_v, slots)
        out, lse = _causal(q, k, v, None if windows is None else windows[layer])
        queries = queries.at[layer].set(jnp.take_along_axis(q, last[..., None, None], axis=1))
        sums = sums.at[layer].set(jnp.take_along_axis(lse, last[..., None], axis=1))
        return out, (pool, queries, sums)

    return attend


def _causal(q: Array, k: Array, v: Array, window: Array | None) -> tuple[Array, Array]:
    """Dense causal attention, a block of queries at a time: [B, T, H, D], and lse [B, T, H]."""
    (b, t, h, d), heads = q.shape, k.shape[2]
    pad = -t % _BLOCK_QUERIES
    blocks = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, pad), (0, 0), (0, 0)))
    blocks = blocks.reshape(b, -1, _BLOCK_QUERIES, heads, h // heads, d)
    wide_k, wide_v = k.astype(jnp.float32), v.astype(jnp.float32)
    key = jnp.arange(t, dtype=jnp.int32)[None]

    def one(i: Array) -> tuple[Array, Array]:
        place = i * _BLOCK_QUERIES + jnp.arange(_BLOCK_QUERIES, dtype=jnp.int32)[:, None]
        seen = key <= place
        if window is not None:
            seen = seen & ((window == 0) | (key > place - window))
        score = jnp.einsum("bqkgd,bskd->bkgqs", blocks[:, i], wide_k, precision="highest")
        score = jnp.where(seen[None, None, None], score * d**-0.5, -jnp.inf)
        lse = jax.nn.logsumexp(score, axis=-1)
        weight = jnp.exp(score - lse[..., None])
        out = jnp.einsum("bkgqs,bskd->bqkgd", weight, wide_v, precision="highest")
        return out, jnp.moveaxis(lse, 3, 1)

    out, lse = jax.lax.map(one, jnp.arange(blocks.shape[1], dtype=jnp.int32))
    out = jnp.swapaxes(out, 0, 1).reshape(b, -1, h, d)[:, :t]
    return out.astype(q.dtype), jnp.swapaxes(lse, 0, 1).reshape(b, -1, h)[:, :t]


@functools.partial(jax.jit, static_argnums=0)
def choose(policy: Policy, view: View, tokens: Array) -> Choice:
    """What a policy keeps of a budget of int32[B] tokens a KV head of a layer."""
    keep = policy.keep(view, tokens)
    needles = jnp.zeros(keep.shape[2:], jnp.bool_) if view.needles is None else view.needles
    found = jnp.mean(keep & needles[None, None], axis=(0, 1), dtype=jnp.float32)
    total = jnp.maximum(jnp.sum(needles, axis=-1, dtype=jnp.int32), 1).astype(jnp.float32)
    return Choice(keep, jnp.sum(found, axis=-1) / total, _error(view, keep))


def _error(view: View, keep: Array) -> Array:
    def one(layer: Array) -> Array:
        keys, values = view.keys(layer), view.values(layer)  # [K, B, S, D]
        q = view.seen.q[layer, :, -1].astype(jnp.float32)  # [B, H, D]
        q = q.reshape(q.shape[0], keys.shape[0], -1, q.shape[-1])
        score = jnp.einsum("bkgd,kbsd->kbgs", q, keys, precision="highest") * q.shape[-1] ** -0.5
        live, kept = view.live[layer], keep[layer]

        def out(mask: Array) -> Array:
            weight = jax.nn.softmax(jnp.where(mask[:, :, None], score, -jnp.inf), axis=-1)
            return jnp.einsum("kbgs,kbsd->kbgd", weight, values, precision="highest")

        whole = out(live)
        norm = jnp.linalg.norm(whole, axis=-1)
        off = jnp.linalg.norm(whole - out(kept), axis=-1) / jnp.maximum(norm, 1e-9)
        return jnp.mean(off, axis=(0, 2))

    layers = jnp.arange(view.shape[0], dtype=jnp.int32)
    return jnp.mean(jax.lax.map(one, layers), axis=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def remove(
    sizes: Sizes, whole_pages: bool, pool: KVPool, table: PageTable, keep: Array
) -> tuple[Evicted, Array]:
    """Evicts all else; also the pages that each row still fills, int32[B]."""
    evicted = evict(pool, table, keep, whole_pages=whole_pages, spare=sizes.spare)
    return evicted, pages_held(evicted.table, pool.k.shape[0], sizes.page_size)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def read_question(
    graph: nnx.GraphDef[Any], sizes: Sizes, params: Any, pool: KVPool, table: PageTable,
    tokens: Array, count: Array,
) -> tuple[KVPool, PageTable, Array]:  # fmt: skip
    """Reads a question after the cache was compressed.

    Args:
        graph: of the decoder; static.
        sizes: static.
        params: of the decoder.
        pool: donated.
        table: the rows.
        tokens: int32[B, X], padded at the end.
        count: int32[B].

    Returns:
        The pool, the table, and the likeliest first token of each answer, int32[B].
    """
    decoder = nnx.merge(graph, params)
    rows, width = tokens.shape
    place = jnp.arange(width, dtype=jnp.int32)[None]
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    used = (place < count[:, None]).reshape(-1)
    row = jnp.broadcast_to(row, tokens.shape).reshape(-1)
    position = (table.position[:, None] + place).reshape(-1)
    first = jnp.arange(rows, dtype=jnp.int32) * width
    pool, table, hidden = extend(
        decoder, sizes, pool, table, tokens.reshape(-1), jnp.where(used, row, rows), position,
        first, first + count, width,
    )  # fmt: skip
    return pool, table, _likeliest(decoder, hidden[first + count - 1])


def extend(
    decoder: Decoder, sizes: Sizes, pool: KVPool, table: PageTable, tokens: Array, row: Array,
    position: Array, first: Array, end: Array, max_queries: int, reading: Reading | None = None,
    budget: Array | None = None,
) -> tuple[KVPool, PageTable, Array]:  # fmt: skip
    """Brings tokens into the rows' pages; each row's stand from `first` to `end`."""
    rows, pages = table.position.shape[0], table.pages.shape[-1]
    pages = pages if reading is None else min(pages, reading.width)
    slots = slots_of(table, row, position, sizes.page_size)
    pool = write_positions(pool, position, slots)
    table = advance(table, row)
    number = jnp.arange(rows, dtype=jnp.int32)
    index = jnp.stack([number, 0 * number, 0 * number + pages, first, end], axis=1)
    items = Items(index=index, count=jnp.int32(rows), max_queries=max_queries, max_pages=pages)
    work = WorkList(
        items=(items,), pages=table.pages, length=table.length,
        query_position=jnp.where(row < rows, position, -1),
    )  # fmt: skip
    windows = decoder.config.layer_windows()
    if reading is None or budget is None:
        hidden, pool = decoder(tokens, position, pool, paged_attend(slots, work, windows))
        return pool, table, hidden
    heads = table.pages.shape[1]
    nothing = Read(jnp.zeros((heads, rows, pages), jnp.int32), jnp.zeros((heads, rows), jnp.int32))
    attend = reading_attend(slots, work, reading.policy, budget, windows)
    hidden, (pool, _) = decoder(tokens, position, (pool, nothing), attend)
    return pool, table, hidden


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 8), donate_argnums=4)
def answer(
    graph: nnx.GraphDef[Any], sizes: Sizes, stops: tuple[int, ...], params: Any, pool: KVPool,
    table: PageTable, token: Array, most: Array, reading: Reading | None = None,
    budget: Array | None = None,
) -> tuple[KVPool, Array]:  # fmt: skip
    """Writes answers, each token the likeliest after those written.

    Args:
        graph: of the decoder; static.
        sizes: static.
        stops: tokens that end an answer; static.
        params: of the decoder.
        pool: donated.
        table: the rows.
        token: int32[B], the answers' first tokens.
        most: int32[B], at most how many each may have.
        reading: static; None: each step reads all pages.
        budget: int32[B], how many tokens a step reads, where `reading` is given.

    Returns:
        The pool, and int32[W, B], -1 after an answer's end; the token that ends it is there.
    """
    decoder = nnx.merge(graph, params)
    if reading is not None:
        bounds = rebuild_bounds(pool.k, None, table.pages, table.length)
        pool = dataclasses.replace(pool, bounds=bounds)
    rows = token.shape[0]
    number = jnp.arange(rows, dtype=jnp.int32)
    ends = jnp.asarray(stops, jnp.int32)[None]

    def live_after(live: Array, token: Array, written: Array) -> Array:
        return live & ~jnp.any(token[:, None] == ends, axis=1) & (written < most)

    def one(carry: tuple) -> tuple:
        i, pool, table, token, live, out = carry
        row = jnp.where(live, number, rows)
        pool, table, hidden = extend(
            decoder, sizes, pool, table, token, row, table.position, number, number + 1, 1,
            reading, budget,
        )  # fmt: skip
        token = jnp.where(live, _likeliest(decoder, hidden), -1)
        return i + 1, pool, table, token, live_after(live, token, i + 1), out.at[i].set(token)

    out = jnp.full((sizes.answer, rows), -1, jnp.int32).at[0].set(token)
    live = live_after(most > 0, token, jnp.int32(1))
    carry = jnp.int32(1), pool, table, token, live, out
    carry = jax.lax.while_loop(lambda c: jnp.any(c[4]) & (c[0] < sizes.answer), one, carry)
    return dataclasses.replace(carry[1], bounds=None), carry[-1]


def _likeliest(decoder: Decoder, hidden: Array) -> Array:
    return jnp.argmax(decoder.logits(hidden), axis=-1).astype(jnp.int32)
