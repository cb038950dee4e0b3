"""A step of a search by tokens: all open nodes of all prompts at once, in one compiled program.

A node brings its last token (a prompt: all of its tokens) to the policy and to the reward model,
one row each. What comes out are the best candidates of each prompt, not vectors over the
vocabulary: those never leave the program, and the trie keeps none.

Letters: R rows, C tokens that a row brings at most, M pages of a row, B prompts, n nodes of a
prompt that come in, N candidates that go out, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.cache import KVPool, PageTable, advance, slots_of
from kvjax.models.attention import paged_attend
from kvjax.models.decoder import Decoder
from kvjax.pallas_kernels.page_attention import Items, WorkList

__all__ = ["Candidates", "Rows", "bring", "nucleus", "pick", "sample_rows"]

Array = jax.Array


class Rows(NamedTuple):
    """What rows bring, and the pages where it goes and where what is before it lies.

    A page that rows share may be written by several of them: they bring the same tokens.

    Attributes:
        tokens: int32[R, C].
        count: int32[R], how many of them; 0: the row is not in use.
        length: int32[R], tokens before these.
        pages: int32[R, M].
    """

    tokens: Any
    count: Any
    length: Any
    pages: Any


class Candidates(NamedTuple):
    """The best continuations of each prompt, best first.

    Attributes:
        score: float32[B, N], what they were ranked by; -inf: there is none.
        reward: float32[B, N], the reward of the edge.
        node: int32[B, N], which of the prompt's n nodes goes on.
        token: int32[B, N], with what.
        logprob: float32[B, N], of the token, by the policy.
    """

    score: Array
    reward: Array
    node: Array
    token: Array
    logprob: Array


def bring(
    decoder: Decoder, pool: KVPool, rows: Rows, place: Array, page_size: int
) -> tuple[KVPool, Array]:
    """Runs a decoder over what the rows bring.

    Args:
        decoder: the model.
        pool: its pages; donate it.
        rows: R of them.
        place: int32[R], which of a row's C tokens is asked for.
        page_size: tokens of a page.

    Returns:
        The pool, and the hidden states [R, E] of those tokens.
    """
    r, c = rows.tokens.shape
    number = jnp.arange(r, dtype=jnp.int32)
    step = jnp.arange(c, dtype=jnp.int32)[None]
    there = step < rows.count[:, None]
    position = (rows.length[:, None] + step).reshape(-1)
    row = jnp.where(there, number[:, None], r).reshape(-1)
    table = PageTable(
        pages=rows.pages[None, None], length=rows.length[None, None], position=rows.length
    )
    slots = slots_of(table, row, position, page_size)
    table = advance(table, row)
    most = rows.pages.shape[1]
    first = number * c
    index = jnp.stack([number, 0 * number, 0 * number + most, first, first + rows.count], axis=1)
    items = Items(index=index, count=jnp.int32(r), max_queries=c, max_pages=most)
    work = WorkList(
        items=(items,), pages=table.pages, length=table.length,
        query_position=jnp.where(there.reshape(-1), position, -1),
    )  # fmt: skip
    attend = paged_attend(slots, work, decoder.config.layer_windows())
    hidden, pool = decoder(rows.tokens.reshape(-1), position, pool, attend)
    return pool, hidden[first + place]


def nucleus(logprob: Array, p: float | Array) -> Array:
    """bool[..., V]: the tokens whose likelier ones together have less than p.

    That is equation 2 of Saffron-1 (arXiv 2506.06444): ties stand or fall together, and the
    likeliest token is always in.
    """
    chance = jnp.exp(logprob)
    ranked = -jnp.sort(-chance, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    inside = (before < p).at[..., 0].set(True)
    cut = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
    return (chance >= cut) & (chance > 0)


def pick(
    logprob: Array, reward: Array, seen: Array, ends: Array, own: Array, live: Array, *, p: float,
    width: int, mix: float, may_end: Array,
) -> Candidates:  # fmt: skip
    """The best edges of each prompt: equation 3 of Saffron-1, with the end treated apart.

    Only tokens in their node's nucleus are candidates, and of those only seen ones, since what a
    reward model says of a token that it never saw means nothing. If a prompt has no such candidate
    at all, the likeliest of its nuclei go on. An end token changes nothing of the text: its reward
    is that of the node, whether it was seen or not.

    Args:
        logprob: float32[B, n, V], of the policy.
        reward: float32[B, n, V], foretold.
        seen: bool[V].
        ends: bool[V], end tokens.
        own: float32[B, n], the reward of each node's last edge.
        live: bool[B, n].
        p: of the nucleus.
        width: N.
        mix: weight of the policy's log-probability beside the reward.
        may_end: bool scalar, whether an answer may end here.
    """
    ends_row, seen_row = ends[None, None], seen[None, None]
    logprob = jnp.where(ends_row & ~may_end, -jnp.inf, logprob)
    # The nucleus is that of the tokens that may follow.
    logprob = logprob - jax.nn.logsumexp(logprob, axis=-1, keepdims=True)
    inside = nucleus(logprob, p) & live[..., None]
    reward = jnp.where(ends_row, own[..., None], reward)
    known = inside & (seen_row | ends_row)
    score = jnp.where(known, reward + (mix * logprob if mix else 0.0), -jnp.inf)
    fallback = jnp.where(inside, logprob, -jnp.inf)
    none = ~jnp.any(known, axis=(1, 2), keepdims=True)
    b, n, v = logprob.shape
    flat = jnp.where(none, fallback, score).reshape(b, n * v)
    if n * v < width:
        flat = jnp.pad(flat, ((0, 0), (0, width - n * v)), constant_values=-jnp.inf)
    top, index = jax.lax.top_k(flat, width)
    index = jnp.minimum(index, n * v - 1)
    at = lambda x: jnp.take_along_axis(x.reshape(b, n * v), index, axis=1)  # noqa: E731
    return Candidates(top, at(reward), index // v, index % v, at(logprob))


def sample_rows(
    logprob: Array, live: Array, ends: Array, keys: Array, *, width: int, may_end: Array
) -> Candidates:
    """Every node goes on with a token that the policy draws; a single one goes on N times.

    Args:
        logprob: float32[B, n, V], n either 1 or N.
        live: bool[B, n].
        ends: bool[V].
        keys: [B], of this step's draws of each prompt.
        width: N.
        may_end: bool scalar.
    """
    b, n, _ = logprob.shape
    logprob = jnp.where(ends[None, None] & ~may_end, -jnp.inf, logprob)
    logprob = logprob - jax.nn.logsumexp(logprob, axis=-1, keepdims=True)
    each = jnp.broadcast_to(logprob, (b, width, logprob.shape[-1])) if n == 1 else logprob
    alive = jnp.broadcast_to(live, (b, width)) if n == 1 else live

    def draw(key: Array, rows: Array) -> Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(width))
        return jax.vmap(jax.random.categorical)(keys, rows)

    token = jax.vmap(draw)(keys, each).astype(jnp.int32)
    chosen = jnp.take_along_axis(each, token[..., None], axis=-1)[..., 0]
    node = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None] % n, (b, width))
    score = jnp.where(alive, 0.0, -jnp.inf)
    return Candidates(score, jnp.zeros_like(score), node, token, chosen)
