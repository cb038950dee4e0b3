"""The contract of `page_attention`."""

import jax

from kvjax.pallas_kernels.page_attention.reference import page_attention_reference
from kvjax.pallas_kernels.page_attention.work import Pages, WorkList

__all__ = ["page_attention"]

Array = jax.Array


def page_attention(
    q: Array,
    pool: Pages,
    layer: Array,
    work: WorkList,
    *,
    window: Array | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Attention of ragged queries to the pages that a work list gives them.

    A key is seen by a query of the same item if its slot is in use and its true position is not
    after the query's. Slots that are not in use may hold anything, NaN included.

    Args:
        q: [T, H, D], rotated.
        pool: pages of keys and values, [N, R, C, P, D].
        layer: int32 scalar of L; selects the table's group `layer // R`, the page's `layer % R`.
        work: the items, the table and the queries' positions.
        window: int32 scalar, how many of the last positions a query sees, its own included; 0 or
            None: all.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)`.
        scale: of the scores; None: D ** -0.5.
        implementation: "reference", or None for the best of the platform.

    Returns:
        out [T, H, D] in q's dtype, and lse float32[T, H], the natural logarithm of the softmax
        sum. A query without keys gets 0 and -inf.

    Raises:
        ValueError: shapes do not fit each other.
        NotImplementedError: no such implementation here.
    """
    heads = work.pages.shape[1] * pool.k.shape[2]
    if q.ndim != 3 or q.shape[1] % heads or q.shape[2] != pool.k.shape[-1]:
        raise ValueError(f"{q.shape=} does not fit {pool.k.shape=} and {work.pages.shape=}")
    if work.query_position.shape != q.shape[:1]:
        raise ValueError(f"{work.query_position.shape=} does not fit {q.shape=}")
    if implementation not in (None, "reference"):
        raise NotImplementedError(f"page_attention has no {implementation=}")
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    return page_attention_reference(q, pool, layer, work, window, soft_cap, scale)
