"""The contract of `page_bounds`.

A page's bounds are float32[..., 3, D]: of each coordinate the least and the largest value among the
page's keys, and their sum. Letters as in `kvjax.cache.pool`: N pages of P tokens, of R layers and C
KV heads; J = K/C head groups, H query heads, B rows of M pages, T new tokens.
"""

import jax

from kvjax.pallas_kernels.page_bounds import reference

__all__ = ["append_bounds", "page_scores", "rebuild_bounds"]

Array = jax.Array


def append_bounds(
    bounds: Array, layer: Array, k: Array, page: Array, offset: Array, *,
    implementation: str | None = None,
) -> Array:  # fmt: skip
    """Takes one layer's new keys into the bounds of their pages.

    Minimum and maximum are, to the last bit, those that all keys together give. A page begins anew
    with the token at its offset 0, whatever it held before.

    Args:
        bounds: float32[N, R, C, 3, D]; donate it.
        layer: int32 scalar of L.
        k: [T, K, D], rotated.
        page: int32[J, T], as of `Slots`; N or above: nowhere.
        offset: int32[J, T].
        implementation: "reference", or None for the best that the default device can run.

    Raises:
        ValueError: shapes do not fit each other.
        NotImplementedError: no such implementation here.
    """
    _check(implementation)
    _, _, c, three, d = bounds.shape
    if three != 3 or k.shape[1:] != (page.shape[0] * c, d) or page.shape != offset.shape:
        raise ValueError(f"{k.shape=} {page.shape=} {offset.shape=} do not fit {bounds.shape=}")
    return reference.append(bounds, layer, k, page, offset)


def rebuild_bounds(
    k: Array, bounds: Array | None, pages: Array, length: Array, *,
    implementation: str | None = None,
) -> Array:  # fmt: skip
    """The bounds of pages that were filled by other means: by a prefill, by a compaction.

    Args:
        k: [N, R, C, P, D], the pool's keys.
        bounds: float32[N, R, C, 3, D], of which other pages stay as they are; None: zeros.
        pages: int32[L/R, K/C, B, M], the table; N or above: no page.
        length: int32[L/R, K/C, B], slots in use.
        implementation: as in `append_bounds`.

    Returns:
        float32[N, R, C, 3, D]. An entry without tokens is left as it is.
    """
    _check(implementation)
    if pages.shape[:-1] != length.shape:
        raise ValueError(f"{pages.shape=} does not fit {length.shape=}")
    return reference.rebuild(k, bounds, pages, length)


def page_scores(
    q: Array, bounds: Array, layer: Array, pages: Array, length: Array, page_size: int, *,
    rep: str = "linear_minmax", alpha: float = 0.6, implementation: str | None = None,
) -> Array:  # fmt: skip
    """How much each row's query is expected to attend to each of the row's pages.

    With r_max and r_min the largest and least of the keys, by coordinate (MPCache, section 3.3):
    "exact_bound" is sum_i max(q_i r_max_i, q_i r_min_i), no key's product is above it (Quest);
    "linear_minmax" is q . (alpha r_max + (1 - alpha) r_min), which needs no comparison;
    "mean" is the product with the mean key. None is scaled by D ** -0.5.

    Args:
        q: [B, H, D], rotated.
        bounds: float32[N, R, C, 3, D].
        layer: int32 scalar of L.
        pages: int32[L/R, K/C, B, M], the table; N or above: no page.
        length: int32[L/R, K/C, B], slots in use.
        page_size: P.
        rep: which.
        alpha: of "linear_minmax".
        implementation: as in `append_bounds`.

    Returns:
        float32[B, H, M]; -inf where there is no page or no token in it.
    """
    _check(implementation)
    heads = pages.shape[1] * bounds.shape[2]
    if q.ndim != 3 or q.shape[1] % heads or q.shape[2] != bounds.shape[-1]:
        raise ValueError(f"{q.shape=} does not fit {bounds.shape=} and {pages.shape=}")
    if rep not in reference.REPRESENTATIONS:
        raise ValueError(f"{rep=}: use one of {', '.join(reference.REPRESENTATIONS)}")
    found, count = reference.gather_bounds(bounds, layer, pages, length, page_size)
    return reference.score_bounds(q, found, count, rep=rep, alpha=alpha)


def _check(implementation: str | None) -> None:
    if implementation not in (None, "reference"):
        raise NotImplementedError(f"page_bounds has no {implementation=}")
