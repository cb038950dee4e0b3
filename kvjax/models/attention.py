"""The `attend`s: what a decoder's layers may be given to attend with."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from kvjax.cache.pool import KVPool, write
from kvjax.cache.table import Slots
from kvjax.models.decoder import Attend
from kvjax.pallas_kernels.page_attention import WorkList, page_attention
from kvjax.pallas_kernels.prefill_attention import prefill_attention
from kvjax.select.mpcache import MPCache, Read
from kvjax.sharding import pool_spec, spec

__all__ = ["causal_attend", "own_heads", "paged_attend", "reading_attend"]

Array = jax.Array


def causal_attend(windows: Array | int | None = None) -> Attend:
    """Attention of whole sequences to themselves, for training and for scoring without a cache.

    See `prefill_attention` for what runs where.

    Args:
        windows: int32[L] from `DecoderConfig.layer_windows`, or one window for all layers, which
            costs a CUDA device less than an array; 0 and None are no window.

    Returns:
        An `attend` for q [B, T, H, D] and k, v [B, T, K, D] whose state passes through untouched.
    """

    def attend(layer: Array, q: Array, k: Array, v: Array, state: object) -> tuple[Array, object]:
        window = 0 if windows is None else windows
        if not isinstance(window, int):
            window = window[layer]
        return prefill_attention(q, k, v, window=window)[0], state

    return attend


def paged_attend(
    slots: Slots, work: WorkList, windows: Array | None = None, mesh: Mesh | None = None
) -> Attend:
    """Attention through a page pool, which is the state: writes the new tokens, then reads.

    A token's key and value are in their page before anything of the same layer attends, so rows
    of one step may read what another row of it writes.

    Args:
        slots: where the T new tokens go.
        work: who reads what, new tokens included; on a mesh prepared for `own_heads`.
        windows: int32[L] from `DecoderConfig.layer_windows`.
        mesh: over whose axis `model` the heads are split, where it divides the pool's.

    Returns:
        An `attend` for q [T, H, D] and k, v [T, K, D] whose state is a `KVPool`.
    """

    def attend(layer: Array, q: Array, k: Array, v: Array, pool: KVPool) -> tuple[Array, KVPool]:
        window = None if windows is None else windows[layer]
        arguments = (layer, window, slots, work, q, k, v, pool)
        if mesh is None:
            return _write_and_read(*arguments)
        heads, pages = PartitionSpec(None, _axis_of_heads(pool, mesh)), _pool_specs(pool, mesh)
        whole = PartitionSpec()
        return jax.shard_map(
            _write_and_read, mesh=mesh, in_specs=(*[whole] * 4, *[heads] * 3, pages),
            out_specs=(heads, pages), check_vma=False,
        )(*arguments)  # fmt: skip

    return attend


def reading_attend(
    slots: Slots, work: WorkList, policy: MPCache, tokens: Array, windows: Array | None = None
) -> Attend:
    """As `paged_attend`, but each query reads those pages of its row that the policy chooses.

    Args:
        slots: where the B new tokens go, one of each row.
        work: an item a row over the entries of a `Read`; its table is that of all pages.
        policy: static.
        tokens: int32[B], how many each row may read.
        windows: int32[L] from `DecoderConfig.layer_windows`.

    Returns:
        An `attend` whose state is a `KVPool` with bounds and a `Read`.
    """

    def attend(
        layer: Array, q: Array, k: Array, v: Array, state: tuple[KVPool, Read]
    ) -> tuple[Array, tuple[KVPool, Read]]:
        pool, read = state
        pool = write(pool, layer, k, v, slots)
        read = policy.read(q, pool, layer, work.pages, work.length, tokens, read)
        own = work.pages[layer // pool.k.shape[1]]
        page = jnp.take_along_axis(own, jnp.minimum(read.entry, own.shape[-1] - 1), axis=-1)
        page = jnp.where(read.entry < own.shape[-1], page, pool.k.shape[0])
        groups = work.pages.shape[0]
        chosen = dataclasses.replace(
            work,
            pages=jnp.broadcast_to(page[None], (groups, *page.shape)),
            length=jnp.broadcast_to(read.length[None], (groups, *read.length.shape)),
        )
        window = None if windows is None else windows[layer]
        out, _ = page_attention(q, pool, layer, chosen, window=window)
        return out, (pool, read)

    return attend


def own_heads(pool: KVPool, num_heads: int, mesh: Mesh | None) -> tuple[KVPool, int]:
    """What one device of a mesh sees in `paged_attend`: the pool's shapes, and its query heads."""
    if mesh is None or (axis := _axis_of_heads(pool, mesh)) is None:
        return pool, num_heads
    parts = mesh.shape[axis]

    def own(x: Array) -> jax.ShapeDtypeStruct:
        n, r, c, p, d = x.shape
        return jax.ShapeDtypeStruct((n, r, c // parts, p, d), x.dtype)

    k, v = cast(tuple[Array, Array], (own(pool.k), own(pool.v)))
    return dataclasses.replace(pool, k=k, v=v), num_heads // parts


def _write_and_read(
    layer: Array, window: Array | None, slots: Slots, work: WorkList, q: Array, k: Array, v: Array,
    pool: KVPool,
) -> tuple[Array, KVPool]:  # fmt: skip
    pool = write(pool, layer, k, v, slots)
    out, _ = page_attention(q, pool, layer, work, window=window)
    return out, pool


def _axis_of_heads(pool: KVPool, mesh: Mesh) -> str | None:
    """The axis of a mesh that splits the pool's heads."""
    return next(iter(spec(("kv_head",), mesh, pool.k.shape[2:3])), None)


def _pool_specs(pool: KVPool, mesh: Mesh) -> KVPool:
    """How a pool's arrays lie on a mesh, see `pool_spec`."""
    return jax.tree.map(lambda x: pool_spec(x, mesh), pool)
