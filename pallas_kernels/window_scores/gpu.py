"""`window_scores` on Hopper GPUs: tokens' sums from one kernel, which reads each key once.

Written in Mosaic GPU (`plgpu.kernel`), for bfloat16 pages and jax 0.11 or later.

A thread block takes a part of one row's tokens, of one KV head. Its producer copies pages of keys
into a ring in shared memory; two consumers take turns at tiles of 64 tokens. Tokens are the rows of
the product and queries its columns, so that the sum over queries is a sum of what a thread holds,
and what a dead slot holds, be it no number, stays in that slot's own row.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kvjax.pallas_kernels.devices import (
    HOPPER_DIMS,
    HOPPER_MULTIPROCESSORS,
    HOPPER_PAGE_SIZES,
)

__all__ = ["token_scores_gpu"]

Array = jax.Array

_TILE = 64
_CONSUMERS = 2
# Scores that a consumer holds at once, of 64 tokens: 64 registers a thread.
_COLUMNS = 128
_RING_BYTES = 128 * 1024
_QUERY_BYTES = 88 * 1024
# What starting a thread block costs, in tiles.
_START = 6
_LOG2_E = math.log2(math.e)


def _why_not(q: Array, pool: Any, group: int, width: int) -> str | None:
    """What keeps the kernel from such queries and pages, or None if nothing does."""
    size, d = pool.k.shape[3:]
    if not q.dtype == pool.k.dtype == jnp.bfloat16:
        return f"queries of {q.dtype}, {pool.k.dtype=}; it takes bfloat16"
    if d not in HOPPER_DIMS or size not in HOPPER_PAGE_SIZES:
        return f"{pool.k.shape=}; it takes D in {HOPPER_DIMS}, P in {HOPPER_PAGE_SIZES}"
    if width > _COLUMNS or group * width * d * 2 > _QUERY_BYTES:
        return f"{q.shape=}; a KV head has room for {_QUERY_BYTES} bytes, A for {_COLUMNS}"
    return None


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the kernel is compiled for, beside the shapes of its arguments.

    Attributes:
        group: G, query heads of a KV head.
        layers_per_page: R.
        heads_per_page: C.
        num_pages: N.
        splits: thread blocks that share a row's tokens.
        tracked: whether the pool knows its tokens' positions.
        scale: of the products.
    """

    group: int
    layers_per_page: int
    heads_per_page: int
    num_pages: int
    splits: int
    tracked: bool
    scale: float


def token_scores_gpu(
    q: Array, lse: Array, pool: Any, layer: Array, pages: Array, end: Array,
    query_position: Array, position: Array, scale: float,
) -> Array:  # fmt: skip
    """What the queries pay to each slot in all.

    Args:
        q: as in `api.window_scores`, and so on.
        lse: as there.
        pool: as there.
        layer: as there.
        pages: int32[J, B, M] of the layer's group.
        end: int32[J, B] likewise.
        query_position: as there.
        position: int32[J, B, S], of the slots; looked at only where the pool has positions.
        scale: as there.

    Returns:
        float32[B, H, S]; anything where a slot is not live.

    Raises:
        NotImplementedError: not for these arguments.
    """
    (b, a, h, d), (j, _, m) = q.shape, pages.shape
    n, r, c, p, _ = pool.k.shape
    group, slots = h // (j * c), m * p
    pad = ((0, 0), (0, -a % 8), (0, 0))
    width = a + pad[1][1]
    reason = _why_not(q, pool, group, width)
    if reason is not None:
        raise NotImplementedError(f"the GPU kernel of window_scores does not take {reason}")
    tiles = -(-slots // _TILE)
    sizes = _Sizes(
        group=group, layers_per_page=r, heads_per_page=c, num_pages=n,
        splits=_splits(b * j * c, tiles), tracked=pool.position is not None, scale=scale,
    )  # fmt: skip
    lse = jnp.swapaxes(jnp.pad(lse * _LOG2_E, pad), 1, 2)
    query_position = jnp.pad(query_position, pad[:2], constant_values=-1)
    places = ()
    if sizes.tracked:
        position = jnp.pad(position, ((0, 0), (0, 0), (0, tiles * _TILE - slots)))
        places = position, jnp.max(position.reshape(j, b, tiles, _TILE), axis=-1)
    scores = _kernel(sizes, q.shape[0], width, h, d, p, tiles)(
        layer.astype(jnp.int32)[None], jnp.pad(q, (*pad, (0, 0))), lse,
        pool.k.reshape(-1, p, d), pages, end, query_position, *places,
    )  # fmt: skip
    return scores[..., :slots]


def _splits(shares: int, tiles: int) -> int:
    """Into how many parts to cut rows of `tiles`, of which there are `shares` with their heads."""
    return min(
        range(1, min(tiles, HOPPER_MULTIPROCESSORS) + 1),
        key=lambda n: -(-shares * n // HOPPER_MULTIPROCESSORS) * (-(-tiles // n) + _START),
    )


def _kernel(sizes: _Sizes, b: int, a: int, h: int, d: int, p: int, tiles: int) -> Any:
    swizzle = next(s for s in (128, 64, 32) if d * 2 % s == 0)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    stages = _RING_BYTES // (2 * _TILE * d) // _CONSUMERS * _CONSUMERS
    copies = max(1, _TILE // p)

    def window_scores(*refs: Any) -> None:
        _Block(sizes, *(refs if sizes.tracked else (*refs[:7], None, None, *refs[7:]))).run()

    return plgpu.kernel(
        window_scores,
        out_type=jax.ShapeDtypeStruct((b, h, tiles * _TILE), jnp.float32),
        scratch_types=[
            plgpu.SMEM((sizes.group, a, d), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((sizes.group, a), jnp.float32),
            plgpu.SMEM((a,), jnp.int32),
            plgpu.SMEM((stages, _TILE, d), jnp.bfloat16, transforms=transforms),
            plgpu.Barrier(num_arrivals=sizes.group + 2),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        grid=(h // sizes.group * b * sizes.splits,),
        grid_names=("block",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Block:
    """A thread block: its references, in global memory and then in shared memory.

    Attributes:
        sizes: static.
        layer: int32[1].
        q: [B, A, H, D].
        lse: float32[B, H, A], to base 2.
        k: [N * R * C, P, D].
        pages: int32[J, B, M].
        end: int32[J, B].
        query_position: int32[B, A].
        position: int32[J, B, S], or None.
        newest: int32[J, B, tiles], the largest position of each tile, or None.
        out: float32[B, H, S].
        queries: [G, A, D].
        query_lse: float32[G, A].
        query_place: int32[A].
        keys: [stages, 64, D].
        queries_full: barrier.
        full: barriers, one a stage.
        empty: likewise.
    """

    sizes: _Sizes
    layer: Any
    q: Any
    lse: Any
    k: Any
    pages: Any
    end: Any
    query_position: Any
    position: Any
    newest: Any
    out: Any
    queries: Any
    query_lse: Any
    query_place: Any
    keys: Any
    queries_full: Any
    full: Any
    empty: Any

    def run(self) -> None:
        me = lax.axis_index("warpgroup")

        @pl.when(me == _CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")
            self._produce()

        @pl.when(me < _CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            self._consume(me)

    def _share(self) -> tuple[Array, Array, Array, Array]:
        """The KV head, the row, the first tile and how many.

        Heads next to each other, whose pages are too, run at the same time.
        """
        heads = self.q.shape[2] // self.sizes.group
        number = lax.axis_index("block")
        head, number = lax.rem(number, jnp.int32(heads)), lax.div(number, jnp.int32(heads))
        splits = jnp.int32(self.sizes.splits)
        part, row = lax.rem(number, splits), lax.div(number, splits)
        page_size, entries = self.k.shape[1], self.pages.shape[2]
        end = jnp.minimum(self.end[self._heads(head), row], entries * page_size)
        tiles = lax.div(jnp.maximum(end, 0) + _TILE - 1, jnp.int32(_TILE))
        most = lax.div(tiles + splits - 1, splits)
        return head, row, part * most, jnp.clip(tiles - part * most, 0, most)

    def _heads(self, head: Array) -> Array:
        return lax.div(head, jnp.int32(self.sizes.heads_per_page))

    @property
    def _stages(self) -> int:
        return self.keys.shape[0]

    def _produce(self) -> None:
        sizes = self.sizes
        head, row, first, count = self._share()
        for g in range(sizes.group):
            source = self.q.at[row, :, head * sizes.group + g]
            plgpu.copy_gmem_to_smem(source, self.queries.at[g], self.queries_full)
        source = self.lse.at[row, pl.ds(head * sizes.group, sizes.group)]
        plgpu.copy_gmem_to_smem(source, self.query_lse, self.queries_full)
        source = self.query_position.at[row]
        plgpu.copy_gmem_to_smem(source, self.query_place, self.queries_full)

        def step(i: Array, pages: list[Array]) -> list[Array]:
            ahead = self._pages(head, row, first + i + 1)
            slot = lax.rem(i, jnp.int32(self._stages))
            # The ring begins empty.
            pl.when(i >= self._stages)(lambda: plgpu.barrier_wait(self.empty.at[slot]))
            self._copy(head, first + i, slot, pages)
            return ahead

        lax.fori_loop(jnp.int32(0), count, step, self._pages(head, row, first))

    def _pages(self, head: Array, row: Array, tile: Array) -> list[Array]:
        """The pages that hold a tile; what lies behind the table is never looked at."""
        size, entries = self.k.shape[1], self.pages.shape[2]
        entry = lax.div(tile * _TILE, jnp.int32(size))
        columns = [jnp.minimum(entry + i, entries - 1) for i in range(max(1, _TILE // size))]
        found = [self.pages[self._heads(head), row, column] for column in columns]
        return [jnp.minimum(page, self.sizes.num_pages - 1) for page in found]

    def _copy(self, head: Array, tile: Array, slot: Array, pages: list[Array]) -> None:
        sizes, size = self.sizes, self.k.shape[1]
        length, inner = min(size, _TILE), lax.rem(self.layer[0], jnp.int32(sizes.layers_per_page))
        at = pl.multiple_of(lax.rem(tile * _TILE, jnp.int32(size)), length)
        for i, page in enumerate(pages):
            index = (page * sizes.layers_per_page + inner) * sizes.heads_per_page
            index = index + lax.rem(head, jnp.int32(sizes.heads_per_page))
            source = self.k.at[index]
            if length < size:
                source = self.k.at[index, pl.ds(at, length)]
            target = self.keys.at[slot, pl.ds(i * length, length)]
            plgpu.copy_gmem_to_smem(source, target, self.full.at[slot])

    def _consume(self, me: Array) -> None:
        head, row, first, count = self._share()
        # Behind the first position of a query there is something that it does not see.
        queries = self.query_position.shape[1]
        oldest = self.query_position[row, 0]
        for i in range(1, queries):
            oldest = jnp.minimum(oldest, self.query_position[row, i])
        plgpu.barrier_wait(self.queries_full)

        def step(i: Array, carry: None) -> None:
            number = i * _CONSUMERS + me
            tile, slot = first + number, lax.rem(number, jnp.int32(self._stages))
            newest = tile * _TILE + (_TILE - 1)
            if self.sizes.tracked:
                newest = self.newest[self._heads(head), row, tile]
            plgpu.barrier_wait(self.full.at[slot])
            self._tile(head, row, tile, slot, newest > oldest)

        lax.fori_loop(jnp.int32(0), lax.div(count + 1 - me, jnp.int32(_CONSUMERS)), step, None)

    def _tile(self, head: Array, row: Array, tile: Array, slot: Array, masked: Array) -> None:
        """Sums of 64 tokens, a few query heads at a time."""
        group = self.sizes.group
        some = max(1, _COLUMNS // self.queries.shape[1])
        for start in range(0, group, some):
            heads = range(start, min(start + some, group))
            scores = self._scores(slot, heads)
            if heads[-1] == group - 1:
                plgpu.barrier_arrive(self.empty.at[slot])
            weights = [self._weights(g, score) for g, score in zip(heads, scores, strict=True)]
            weights = lax.cond(
                masked, lambda w: [self._hide(head, row, tile, x) for x in w], lambda w: w, weights
            )
            tokens = pl.ds(pl.multiple_of(tile * _TILE, _TILE), _TILE)
            for g, weight in zip(heads, weights, strict=True):
                self.out[row, head * group + g, tokens] = jnp.sum(weight, axis=1)

    def _scores(self, slot: Array, heads: range) -> tuple[Array, ...]:
        """Products of 64 keys and each head's queries, [64, A]."""

        def multiply(*products: Any) -> tuple[Array, ...]:
            for g, product in zip(heads, products, strict=True):
                plgpu.wgmma(product, self.keys.at[slot], self.queries.at[g].T)
            return tuple(product[...] for product in products)

        shape = _TILE, self.queries.shape[1]
        refs = [plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for _ in heads]
        return pl.run_scoped(multiply, *refs)

    def _weights(self, g: int, score: Array) -> Array:
        lse = _load(self.query_lse.at[g], plgpu.Layout.WGMMA.reduce(0))
        lse = lax.broadcast_in_dim(lse, score.shape, [1])
        return jnp.exp2(score * (self.sizes.scale * _LOG2_E) - lse)

    def _hide(self, head: Array, row: Array, tile: Array, weight: Array) -> Array:
        """No query sees what comes after it."""
        query = _load(self.query_place, plgpu.Layout.WGMMA.reduce(0))
        if self.sizes.tracked:
            tokens = pl.ds(pl.multiple_of(tile * _TILE, _TILE), _TILE)
            held = self.position.at[self._heads(head), row, tokens]
            key = _load(held, plgpu.Layout.WGMMA.reduce(1), optimized=False)
            key = lax.broadcast_in_dim(key, weight.shape, [0])
        else:
            key = plgpu.broadcasted_iota(jnp.int32, weight.shape, 0, layout=plgpu.Layout.WGMMA)
            key = key + tile * _TILE
        seen = key <= lax.broadcast_in_dim(query, weight.shape, [1])
        return jnp.where(seen, weight, 0.0)


def _load(ref: Any, layout: Any, optimized: bool = True) -> Array:
    # jax 0.10 wants the index beside the reference; it is not for these kernels.
    return plgpu.load(ref, layout=layout, optimized=optimized)  # pyright: ignore[reportCallIssue]
