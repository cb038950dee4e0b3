"""Arithmetic that is cheap on secret shares: few comparisons, few rounds, nothing opened.

Values are fixed-point numbers there. Sums, products with public integers and moves cost nothing; a
product costs a message; a comparison, a division and an exponential cost many. Every function here
is plain JAX too, and computes the same in the clear.

Sources: Dong et al. 2023 (PUMA) for softmax and SiLU; Zeng et al. 2025 (MPCache) section 3 for
choosing and gathering by one-hot vectors, where the released code has floating-point ones and a
top-k that opens comparisons of shuffled values.
"""

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "as_number", "engine_top_k", "fold_queries", "integer_product", "keep_top", "one_hot",
    "rank_top_k", "ranks", "rms_norm", "rotate", "silu", "softmax_parts",
]  # fmt: skip

Array = jax.Array
# exp of less is below the precision of 18 fraction bits (PUMA, section 4.1).
_LOWEST = -14.0


def softmax_parts(scores: Array, real: Array | None = None) -> tuple[Array, Array]:
    """Numerators and one reciprocal of a softmax over the last axis (PUMA, equation 4).

    Args:
        scores: float[..., n]; what is not real must not be the largest.
        real: public bool[..., n], which entries count; by default all.

    Returns:
        float[..., n] and float[..., 1].
    """
    x = scores - jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(x > _LOWEST, jnp.exp(x), jnp.zeros_like(x))
    if real is not None:
        weights = jnp.where(real, weights, jnp.zeros_like(weights))
    return weights, 1.0 / jnp.sum(weights, axis=-1, keepdims=True)


def silu(x: Array) -> Array:
    """Multiplies x by its logistic function, whose division is a few products.

    1 + exp(-|x|) lies in (1, 2], where Newton's iteration needs no search for a start: from the
    line 24/17 - 8/17 y three steps reach 1e-9.
    """
    negative = x < 0
    y = jnp.where(negative, -x, x)
    small = jnp.where(y < -_LOWEST, jnp.exp(-y), jnp.zeros_like(y))
    y = 1.0 + small
    inverse = 24 / 17 - (8 / 17) * y
    for _ in range(3):
        inverse = inverse * (2.0 - y * inverse)
    return x * jnp.where(negative, 1.0 - inverse, inverse)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis; x: [..., E], scale: [E]."""
    mean = jnp.sum(x * x, axis=-1, keepdims=True) * (1.0 / x.shape[-1])
    return x * jax.lax.rsqrt(mean + eps) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding with public angles, half-split as in the Llama checkpoints.

    Args:
        x: [T, heads, D].
        cos: float[T, D/2], public.
        sin: likewise.
    """
    x1, x2 = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def integer_product(whole: Array, x: Array) -> Array:
    """A product of integers [..., m, n] and fixed-point numbers [..., n, d]: nothing to round.

    Rounding, which a product of two fixed-point numbers needs, is most of its messages.
    """
    batch = tuple(range(x.ndim - 2))
    axes = (((whole.ndim - 1,), (x.ndim - 2,)), (batch, batch))
    return jax.lax.dot_general(whole, x, axes, preferred_element_type=x.dtype)


def fold_queries(q: Array, group: int) -> Array:
    """Rows laid out so that one matrix product serves several heads.

    Row h has its values in its own block and public zeros elsewhere. The engine multiplies batches
    one after the other; one product takes the rounds of one, for `group` times the local work.

    Args:
        q: [H, m, d].
        group: how many heads share a product; divides H.

    Returns:
        [H / group, group * m, group * d].
    """
    heads, rows, size = q.shape
    q = q.reshape(heads // group, group, rows, 1, size)
    own = np.eye(group, dtype=bool)[None, :, None, :, None]
    wide = jnp.broadcast_to(q, (heads // group, group, rows, group, size))
    wide = jnp.where(jnp.broadcast_to(own, wide.shape), wide, jnp.zeros((), q.dtype))
    return wide.reshape(heads // group, group * rows, group * size)


def ranks(scores: Array) -> Array:
    """How many entries stand before each one: 0 is the largest, the first of equal ones wins.

    Every pair is compared once and all at the same time, so the rounds are those of one comparison
    however many rows there are; nothing is opened.

    Args:
        scores: float[R, n].

    Returns:
        int32[R, n], a permutation in each row.
    """
    rows, n = scores.shape
    if n == 1:
        return jnp.zeros((rows, 1), jnp.int32)
    # Entry i meets i + 1 to i + n/2, round the end: each pair once, the last half row aside.
    distances, pairs = n // 2, n * (n - 1) // 2
    place = np.arange(n)[None] + np.arange(1, distances + 1)[:, None]
    wraps, real = (place >= n)[None], (np.arange(distances * n) < pairs).reshape(1, distances, n)
    mine = jnp.broadcast_to(scores[:, None], (rows, distances, n))
    other = _ahead(scores, distances)
    wraps = jnp.broadcast_to(jnp.asarray(wraps), mine.shape)
    first, second = jnp.where(wraps, other, mine), jnp.where(wraps, mine, other)
    flat = first.reshape(rows, -1)[:, :pairs] < second.reshape(rows, -1)[:, :pairs]
    late = as_number(flat.astype(jnp.int32))  # the one with the higher place wins
    late = jnp.pad(late, ((0, 0), (0, distances * n - pairs))).reshape(mine.shape)
    loses = jnp.where(wraps, 1 - late, late) * jnp.asarray(real, jnp.int32)
    wins = (1 - loses) * jnp.asarray(real, jnp.int32)
    return jnp.sum(loses, axis=1) + jnp.sum(_back(wins), axis=1)


def _ahead(x: Array, distances: int) -> Array:
    """x[(i + d) mod n] for d from 1: [R, distances, n] of [R, n], by moves alone."""
    rows, n = x.shape
    length = distances * (n + 1)
    repeated = jnp.tile(x, (1, -(-(length + 1) // n)))
    return repeated[:, 1 : length + 1].reshape(rows, distances, n + 1)[:, :, :n]


def _back(x: Array) -> Array:
    """Row d moved d places on, round the end: what was said of i + d comes to its place."""
    rows, distances, n = x.shape
    flat = jnp.concatenate([x, x], axis=2).reshape(rows, -1)
    flat = jnp.pad(flat, ((0, 0), (0, n)))[:, n - 1 : n - 1 + distances * (2 * n - 1)]
    return flat.reshape(rows, distances, 2 * n - 1)[:, :, :n]


def rank_top_k(scores: Array, k: int) -> Array:
    """One-hot rows of the k largest entries, largest first: int32[R, k, n] of float[R, n]."""
    return one_hot(ranks(scores), k).swapaxes(-1, -2)


def one_hot(index: Array, size: int) -> Array:
    """int32[..., size]: 1 where a secret int32[...] equals the place, 0 everywhere else."""
    places = jnp.arange(size, dtype=index.dtype).reshape((1,) * index.ndim + (size,))
    return as_number((index[..., None] == places).astype(jnp.int32))


def as_number(bits: Array) -> Array:
    """The same int32 array, shared as numbers and no longer as bits.

    A comparison's bit is turned into a number anew wherever it is multiplied; a product with a
    public identity matrix does it once.
    """
    width = 8
    flat = bits.reshape(-1)
    flat = jnp.pad(flat, (0, -flat.size % width)).reshape(-1, width)
    return (flat @ jnp.eye(width, dtype=jnp.int32)).reshape(-1)[: bits.size].reshape(bits.shape)


def keep_top(scores: Array, kept: int) -> Array:
    """Compaction: one-hot rows of the `kept` largest entries in their order, int32[kept, n].

    A place is written with two digits, whose one-hot vectors cost far fewer comparisons than one
    vector of full length would.

    Args:
        scores: float[n].
        kept: how many stay.
    """
    n, digit = scores.size, 32
    stays = as_number((ranks(scores[None])[0] < kept).astype(jnp.int32))
    before = jnp.asarray(np.triu(np.ones((n, n), np.int32), 1))
    place = stays * (stays[None] @ before)[0] + stays - 1  # -1: dropped
    high = place >> 5
    low = one_hot(place - (high << 5), digit)
    high = one_hot(high, -(-kept // digit))
    both = high[:, :, None] * low[:, None, :]
    return both.reshape(n, -1)[:, :kept].T


def engine_top_k(scores: Array, k: int) -> Array:
    """As `rank_top_k`, by the engine's own top-k: fewer bytes for long rows, many more rounds.

    It works row by row and opens the outcome of comparisons after a secret shuffle: who watches
    learns which entries are equal. The order of the k is not defined.
    """
    _, index = jax.lax.top_k(scores, k)
    return one_hot(index.astype(jnp.int32), scores.shape[-1])
