"""`page_attention` on Hopper GPUs: one kernel a class of items, and one that merges.

Written in Mosaic GPU (`plgpu.kernel`), for bfloat16 pages and jax 0.11 or later.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.devices import (
    HOPPER_DIMS,
    HOPPER_MULTIPROCESSORS,
    HOPPER_PAGE_SIZES,
)
from kvjax.pallas_kernels.page_attention.gpu_plan import Plan, Shape, make_plan
from kvjax.pallas_kernels.page_attention.work import Pages, WorkList

__all__ = ["page_attention_gpu", "prepare_gpu", "why_not"]

Array = jax.Array


def why_not(
    pool: Pages, num_heads: int, dtype: jnp.dtype, scale: float | None = None
) -> str | None:
    """What keeps the GPU kernels from such a call, or None if nothing does."""
    _, _, _, size, dim = pool.k.shape
    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__}; they need 0.11"
    if not dtype == pool.k.dtype == pool.v.dtype == jnp.bfloat16:
        return f"queries of {dtype}, {pool.k.dtype=}, {pool.v.dtype=}; they take bfloat16"
    if dim not in HOPPER_DIMS or size not in HOPPER_PAGE_SIZES or num_heads * dim % 128:
        return (
            f"{pool.k.shape=}, {num_heads=}; they take D in {HOPPER_DIMS}, "
            f"P in {HOPPER_PAGE_SIZES} and H * D a multiple of 128"
        )
    if scale is not None and scale <= 0:
        return f"{scale=}; they take positive ones"
    return None


def prepare_gpu(
    work: WorkList, pool: Pages, num_heads: int, max_partials: int | None = None
) -> WorkList:
    """See `api.prepare`."""
    return dataclasses.replace(work, prepared=_plan(work, pool, num_heads, max_partials))


def _plan(work: WorkList, pool: Pages, num_heads: int, max_partials: int | None = None) -> Plan:
    num_pages, _, per_page, size, dim = pool.k.shape
    group = num_heads // (work.pages.shape[1] * per_page)
    return make_plan(
        work, page_size=size, num_pages=num_pages, group=group, heads_per_page=per_page, dim=dim,
        max_partials=max_partials, position=pool.position,
    )  # fmt: skip


def page_attention_gpu(
    q: Array, pool: Pages, layer: Array, work: WorkList,
    window: Array | None, soft_cap: float | None, scale: float,
) -> tuple[Array, Array]:  # fmt: skip
    """See `api.page_attention`.

    Raises:
        NotImplementedError: not for these arguments.
    """
    reason = why_not(pool, q.shape[1], q.dtype, scale)
    if reason is not None:
        raise NotImplementedError(f"the GPU kernels of page_attention do not take {reason}")
    from kvjax.pallas_kernels.page_attention.gpu_attend import attend_units
    from kvjax.pallas_kernels.page_attention.gpu_merge import merge_partials
    from kvjax.pallas_kernels.page_attention.gpu_task import Sizes

    plan = work.prepared or _plan(work, pool, q.shape[1])
    (t, h, d), (_, r, c, size, _) = q.shape, pool.k.shape
    _check(plan, work, h // (c * work.pages.shape[1]), pool)
    k, v = (plane.reshape(-1, size, d) for plane in (pool.k, pool.v))
    # Not initialised: every query is written, by a kernel of a class or by the merge.
    out, lse = jax.new_ref(jax.lax.empty((t, h * d), q.dtype)), _new(t, h)
    room = max(plan.max_partials, 1)
    part, part_lse = _new(room, h * d), _new(room, h)
    windowed = window is not None
    layer = layer.astype(jnp.int32)[None]
    reach = jnp.zeros(1, jnp.int32) if window is None else window.astype(jnp.int32)[None]
    sizes = tuple(
        Sizes(
            shape=units.shape, heads=h, dim=d, page_size=size, layers_per_page=r,
            heads_per_page=c, head_groups=work.pages.shape[1], scale=scale, soft_cap=soft_cap,
            windowed=windowed, tracked=plan.position is not None, blocks=HOPPER_MULTIPROCESSORS,
            backwards=i % 2 == 1,
        )
        for i, units in enumerate(plan.classes)
    )  # fmt: skip
    attend_units(
        sizes, layer, reach, q, k, v, work.pages, work.query_position, plan, out, lse, part,
        part_lse,
    )  # fmt: skip
    merge_partials(
        plan.merge, plan.num_merges[None], out, lse, part, part_lse, blocks=HOPPER_MULTIPROCESSORS
    )
    return jax.freeze(out).reshape(t, h, d), jax.freeze(lse)


def _new(*shape: int) -> jax.Ref:
    return jax.new_ref(jax.lax.empty(shape, jnp.float32))


def _check(plan: Plan, work: WorkList, group: int, pool: Pages) -> None:
    _, _, per_page, page_size, dim = pool.k.shape
    shapes = tuple(Shape.of(items.max_queries, group, per_page, dim) for items in work.items)
    made_for = tuple(units.shape for units in plan.classes)
    if (plan.position is None) != (pool.position is None):
        raise ValueError("the work list was prepared for another pool, as to true positions")
    if (made_for, plan.page_size) != (shapes, page_size):
        raise ValueError(
            f"the work list was prepared for {made_for} and pages of {plan.page_size} tokens; "
            f"this call has {shapes} and pages of {page_size}"
        )
