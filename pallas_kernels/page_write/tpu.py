"""`page_write` on TPU: a Mosaic kernel that rewrites, in place, only the tiles that tokens fall in.

A tile is what memory can be written in: 8 tokens of float32, 16 of bfloat16. The tokens come sorted
by tile, so that every tile is read and written once and no two copies in flight meet.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["page_write_tpu"]

Array = jax.Array

# Tokens of a grid step, how far ahead of a token its tile is fetched, and the tiles in flight.
_BLOCK, _AHEAD, _TILES = 256, 16, 32
# Bytes of VMEM for the tiles and for the tokens.
_TILE_BYTES, _TOKEN_BYTES = 8 << 20, 8 << 20
_SPARE_BYTES = 8 << 20
_SMEM_BYTES = 512 << 10


class _Refs(NamedTuple):
    """All that the kernel touches.

    Attributes:
        inner: SMEM int32[1], the page's layer.
        count: SMEM int32[J], the tokens that have a page.
        page: SMEM int32[J * T], sorted.
        offset: SMEM int32[J * T], likewise.
        k: VMEM float32[1, tokens, C, D], likewise.
        v: as k.
        k_pages: HBM [N, R, C, P, D].
        v_pages: as k_pages.
        k_tiles: VMEM [tiles, C, tile, D].
        v_tiles: as k_tiles.
        reads: a DMA semaphore a tile.
        writes: likewise.
    """

    inner: Any
    count: Any
    page: Any
    offset: Any
    k: Any
    v: Any
    k_pages: Any
    v_pages: Any
    k_tiles: Any
    v_tiles: Any
    reads: Any
    writes: Any


def page_write_tpu(
    k_pages: Array, v_pages: Array, layer: Array, k: Array, v: Array, page: Array, offset: Array,
    *, interpret: Any = False,
) -> tuple[Array, Array]:  # fmt: skip
    """See `api.page_write`.

    Args:
        k_pages: pages of 8 (float32) or 16 (bfloat16) tokens, or a multiple.
        v_pages: as k_pages.
        layer: as there, and so on.
        k: as there.
        v: as there.
        page: as there.
        offset: as there.
        interpret: as in `pl.pallas_call`.

    Raises:
        NotImplementedError: with the shapes, where this needs the reference.
    """
    n, r, c, p, _ = k_pages.shape
    tile = 32 // k_pages.dtype.itemsize
    block = _check(k_pages, page, tile)
    fits = (page >= 0) & (page < n) & (offset >= 0) & (offset < p)
    key = jnp.where(fits, page * (p // tile) + offset // tile, 2**31 - 1)
    token = jnp.broadcast_to(jnp.arange(page.shape[1], dtype=jnp.int32)[None], page.shape)
    _, page_of, offset_of, token = jax.lax.sort((key, page, offset, token), num_keys=1)
    count = jnp.sum(fits, axis=1, dtype=jnp.int32)
    call = _call(k_pages, page.shape, block, tile, interpret)
    scalars = ((layer % r).reshape(1), count, page_of.reshape(-1), offset_of.reshape(-1))
    return call(*scalars, *(_sorted(x, token, c, block) for x in (k, v)), k_pages, v_pages)


def _check(pages: Array, page: Array, tile: int) -> int:
    """How many tokens a grid step takes."""
    _, _, c, p, d = pages.shape
    if pages.dtype not in (jnp.float32, jnp.bfloat16) or p % tile:
        raise NotImplementedError(f"on TPU: {pages.shape=} {pages.dtype=}, pages are tiles")
    if 8 * page.size > _SMEM_BYTES:
        raise NotImplementedError(f"on TPU: {page.shape=} does not fit in SMEM")
    lanes = -(-d // 128) * 128
    block = _TOKEN_BYTES // (4 * 4 * -(-c // 8) * 8 * lanes)
    if 2 * _TILES * 32 * c * lanes > _TILE_BYTES or block < 1:
        raise NotImplementedError(f"on TPU: the tiles of {pages.shape=} do not fit in VMEM")
    return min(block, _BLOCK, page.shape[1])


def _sorted(x: Array, token: Array, c: int, block: int) -> Array:
    """Keys or values [T, K, D] as float32[J, T', C, D] in the order of `token`, int32[J, T]."""
    t, _, d = x.shape
    x = x.astype(jnp.float32).reshape(t, -1, c, d)
    x = x[token, jnp.arange(token.shape[0], dtype=jnp.int32)[:, None]]
    return jnp.pad(x, ((0, 0), (0, -t % block), (0, 0), (0, 0)))


def _call(
    pages: Array, tokens: tuple[int, ...], block: int, tile: int, interpret: Any
) -> Any:  # fmt: skip
    _, _, c, _, d = pages.shape
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    new = pl.BlockSpec((1, block, c, d), lambda i, j, *_: (i, j, 0, 0))
    moved = 4 * math.prod(tokens) * c * d * (tile * pages.dtype.itemsize + 2)
    return pl.pallas_call(
        functools.partial(_kernel, total=tokens[1], tile=tile),
        name="page_write_tpu",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(tokens[0], -(-tokens[1] // block)),
            in_specs=[new, new, hbm, hbm],
            out_specs=[hbm, hbm],
            scratch_shapes=[
                *[pltpu.VMEM((_TILES, c, tile, d), pages.dtype)] * 2,
                *[pltpu.SemaphoreType.DMA((_TILES,))] * 2,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(pages.shape, pages.dtype)] * 2,
        input_output_aliases={6: 0, 7: 1},
        compiler_params=pltpu.CompilerParams(
            # Tokens of one tile may lie in two steps.
            dimension_semantics=("parallel", "arbitrary"),
            # They take half of the scalar work, and what does not fit a page is not counted.
            disable_bounds_checks=True,
            vmem_limit_bytes=_TILE_BYTES + _TOKEN_BYTES + _SPARE_BYTES,
        ),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
    )


def _kernel(*refs: Any, total: int, tile: int) -> None:
    """One grid step: some sorted tokens of a head group."""
    refs = _Refs(*refs[:6], *refs[8:])  # the pages are read where they are written
    group, block = pl.program_id(0), refs.k.shape[1]
    begin = group * total + pl.program_id(1) * block
    count = jnp.clip(refs.count[group] - pl.program_id(1) * block, 0, block)
    _Step(refs, begin, count, tile).run()


@dataclasses.dataclass(frozen=True)
class _Step:
    """The walk over tokens; a run is those of one tile."""

    refs: _Refs
    begin: Array
    count: Array
    tile: int

    def run(self) -> None:
        zero = jnp.int32(0)
        fetched = jax.lax.fori_loop(0, _AHEAD, self._fetch, zero)

        def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            fetched, runs = carry
            fetched = self._fetch(i + _AHEAD, fetched)
            new = self._new(i)
            runs = runs + new.astype(jnp.int32)
            slot = (runs - 1) % _TILES
            pl.when(new)(lambda: self._copies(zero, slot, read=True, start=False))
            self._insert(i, slot)
            last = (i + 1 == self.count) | self._new(jnp.minimum(i + 1, self.count - 1))
            pl.when(last)(lambda: self._copies(i, slot, read=False, start=True))
            return fetched, runs

        _, runs = jax.lax.fori_loop(0, self.count, step, (fetched, zero))

        def finish(slot: Array, carry: None) -> None:
            self._copies(zero, slot, read=False, start=False)

        jax.lax.fori_loop(0, jnp.minimum(runs, _TILES), finish, None)

    def _place(self, i: Array) -> tuple[Array, Array]:
        """Page, and tile of it."""
        refs = self.refs
        return refs.page[self.begin + i], refs.offset[self.begin + i] // self.tile

    def _new(self, i: Array) -> Array:
        """Whether a token is the first of its tile."""
        (page, tile), (before, tile_before) = self._place(i), self._place(jnp.maximum(i - 1, 0))
        return (i == 0) | (page != before) | (tile != tile_before)

    def _fetch(self, i: Array, fetched: Array) -> Array:
        """Starts to read the tile of a token that is the first; returns the tiles fetched."""
        new = (i < self.count) & self._new(jnp.clip(i, 0, jnp.maximum(self.count - 1, 0)))
        slot = fetched % _TILES

        def start() -> None:
            used = fetched >= _TILES
            pl.when(used)(lambda: self._copies(i, slot, read=False, start=False))
            self._copies(i, slot, read=True, start=True)

        pl.when(new)(start)
        return fetched + new.astype(jnp.int32)

    def _copies(self, i: Array, slot: Array, *, read: bool, start: bool) -> None:
        """Starts, or awaits, the copies of a token's tile of keys and values."""
        refs = self.refs
        page, tile = self._place(i)
        rows = pl.ds(pl.multiple_of(tile * self.tile, self.tile), self.tile)
        sem = (refs.reads if read else refs.writes).at[slot]
        for pages, tiles in ((refs.k_pages, refs.k_tiles), (refs.v_pages, refs.v_tiles)):
            there, here = pages.at[page, refs.inner[0], :, rows], tiles.at[slot]
            source, target = (there, here) if read else (here, there)
            copy = pltpu.make_async_copy(source, target, sem)
            copy.start() if start else copy.wait()

    def _insert(self, i: Array, slot: Array) -> None:
        refs = self.refs
        offset = refs.offset[self.begin + i] % self.tile
        for new, tiles in ((refs.k, refs.k_tiles), (refs.v, refs.v_tiles)):
            for head in range(tiles.shape[1]):
                old = tiles[slot, head]
                here = jax.lax.broadcasted_iota(jnp.int32, old.shape, 0) == offset
                token = jnp.broadcast_to(new[0, i, pl.ds(head, 1)], old.shape)
                merged = jnp.where(here, token, old.astype(jnp.float32))
                tiles[slot, head] = merged.astype(old.dtype)
