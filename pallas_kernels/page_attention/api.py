"""The contract of `page_attention`."""

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.devices import default_device, on_hopper
from kvjax.pallas_kernels.page_attention.gpu import page_attention_gpu, prepare_gpu, why_not
from kvjax.pallas_kernels.page_attention.reference import page_attention_reference
from kvjax.pallas_kernels.page_attention.tpu import page_attention_tpu
from kvjax.pallas_kernels.page_attention.work import Pages, WorkList

__all__ = ["page_attention", "prepare"]

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
        implementation: "reference", "gpu" (Hopper), "tpu", or None for the best that the default
            device can run.

    Returns:
        out [T, H, D] in q's dtype, and lse float32[T, H], the natural logarithm of the softmax
        sum. A query without keys gets 0 and -inf.

    Raises:
        ValueError: shapes do not fit each other.
        NotImplementedError: no such implementation here, or it cannot do this.
    """
    heads = work.pages.shape[1] * pool.k.shape[2]
    if q.ndim != 3 or q.shape[1] % heads or q.shape[2] != pool.k.shape[-1]:
        raise ValueError(f"{q.shape=} does not fit {pool.k.shape=} and {work.pages.shape=}")
    if work.query_position.shape != q.shape[:1]:
        raise ValueError(f"{work.query_position.shape=} does not fit {q.shape=}")
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    best = implementation or _best(pool, q.shape[1], q.dtype, scale)
    if best == "tpu":
        try:
            return page_attention_tpu(q, pool, layer, work, window, soft_cap, scale)
        except NotImplementedError:
            if implementation is not None:
                raise
            best = "reference"
    if best == "reference":
        return page_attention_reference(q, pool, layer, work, window, soft_cap, scale)
    if best == "gpu":
        return page_attention_gpu(q, pool, layer, work, window, soft_cap, scale)
    raise NotImplementedError(f"page_attention has no {implementation=}")


def prepare(
    work: WorkList,
    pool: Pages,
    num_heads: int,
    *,
    max_partials: int | None = None,
    implementation: str | None = None,
) -> WorkList:
    """The work list with what does not depend on the layer computed, once for all layers.

    Without it every call of `page_attention` does so itself.

    Args:
        work: of a step.
        pool: the pages that it will be used with.
        num_heads: H of the queries.
        max_partials: room for the partial results of queries that are in several items, counted
            in (item, query) pairs of all items that such a query is in; None: as many as the
            items have room for.
        implementation: as for `page_attention`.
    """
    implementation = implementation or _best(pool, num_heads, pool.k.dtype)
    return prepare_gpu(work, pool, num_heads, max_partials) if implementation == "gpu" else work


def _best(pool: Pages, num_heads: int, dtype: jnp.dtype, scale: float | None = None) -> str:
    """The implementation for the default device, as known when a function is traced.

    Choosing at lowering time (`jax.lax.platform_dependent`) would trace the kernels wherever
    there is no GPU too, which takes seconds a shape.
    """
    # Kernels for true positions are there, but have not been tried on a GPU yet.
    fits = pool.position is None and why_not(pool, num_heads, dtype, scale) is None
    if fits and on_hopper():
        return "gpu"
    return "tpu" if default_device().platform == "tpu" else "reference"
