"""The static sizes of the TPU kernel: what it keeps in VMEM, and in which pieces it computes.

Letters beside those of the contract: J = K/C head groups; a *row* here is one query of one query
head, so that a KV head has T * G rows, G of them next to each other for every query.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.page_attention.work import Pages, WorkList

__all__ = ["ClassSizes", "Sizes", "sizes_of"]

LANES, SUBLANES = 128, 8
# Bytes of VMEM for the rows' state and for the pages in flight. The smallest VMEM of the chips
# that we compile for has 64 MiB (v5p, tpu7x), and the compiler needs some for itself.
_STATE_BYTES, _PAGE_BYTES = 20 << 20, 8 << 20
_SPARE_BYTES = 8 << 20
# Of the 1 MiB of SMEM that every such chip has.
_SMEM_BYTES = 896 << 10
# Tokens of a block: enough work to hide a step's fixed costs.
_BLOCK_TOKENS = 512
# Rows of all heads that one piece of a block computes: its scores have to stay near registers.
_PIECE_ROWS = 256


@dataclasses.dataclass(frozen=True)
class ClassSizes:
    """One size class of items.

    Attributes:
        start: where its items begin among those of all classes.
        rows: rows of state that an item may touch, a multiple of 8.
        piece_rows: rows of one piece; divides `rows`.
        piece_heads: KV heads of one piece; divides the heads of a grid step.
    """

    start: int
    rows: int
    piece_rows: int
    piece_heads: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """See `sizes_of`.

    Attributes:
        group: G, query heads a KV head.
        heads: KV heads of a grid step; divides C.
        rows: rows of a grid step, a multiple of 128.
        row_blocks: grid steps that all rows take.
        block_pages: pages of a block: what is fetched and computed at a time.
        slots: blocks in flight, the one that is computed included.
        classes: of items.
        vmem_bytes: the limit for the compiler.
    """

    group: int
    heads: int
    rows: int
    row_blocks: int
    block_pages: int
    slots: int
    classes: tuple[ClassSizes, ...]
    vmem_bytes: int


def sizes_of(q: jax.Array, pool: Pages, work: WorkList, cores: int) -> Sizes:
    """Sizes that fit the chip.

    Args:
        q: [T, H, D].
        pool: as in the contract.
        work: as in the contract.
        cores: TensorCores that share the grid: its first axis is cut in as many parts.

    Raises:
        NotImplementedError: with the shapes, if they fit no tile or no memory.
    """
    (t, h, d), c = q.shape, pool.k.shape[2]
    group = h // (work.pages.shape[1] * c)
    _check(q, pool, work)
    heads = c // cores if c % cores == 0 and work.pages.shape[1] % cores else c
    least = max([LANES, *(_rows_of(items.max_queries, group)[0] for items in work.items)])
    least = _round_up(least, LANES)
    # Blocks of queries come first: they cost little, while heads apart make every copy smaller.
    while heads > 1 and least * _row_bytes(d, heads) > _STATE_BYTES:
        heads = next(n for n in range(heads - 1, 0, -1) if c % n == 0)
    most = _STATE_BYTES // _row_bytes(d, heads) // LANES * LANES
    if most < least:
        raise NotImplementedError(f"{q.shape=} with {[i.max_queries for i in work.items]} queries")
    row_blocks = -(-max(1, t * group) // most)
    rows = max(least, _round_up(-(-t * group // row_blocks), LANES))
    block_pages, slots, page_bytes = _pages_in_flight(pool, work, heads)
    starts = [0]
    for items in work.items:
        starts.append(starts[-1] + items.index.shape[0])
    return Sizes(
        group=group,
        heads=heads,
        rows=rows,
        row_blocks=row_blocks,
        block_pages=block_pages,
        slots=slots,
        classes=tuple(
            _pieces(start, *_rows_of(items.max_queries, group), heads)
            for start, items in zip(starts, work.items, strict=False)
        ),
        vmem_bytes=rows * _row_bytes(d, heads) + page_bytes + _SPARE_BYTES,
    )


def _check(q: jax.Array, pool: Pages, work: WorkList) -> None:
    dtype, size = pool.k.dtype, pool.k.shape[3]
    floats = (jnp.float32, jnp.bfloat16)
    if dtype not in floats or q.dtype not in floats:
        raise NotImplementedError(f"on TPU: {q.dtype=} {dtype=}, float32 and bfloat16 are there")
    tile = SUBLANES * 4 // dtype.itemsize
    if size % tile or size > LANES:
        raise NotImplementedError(f"on TPU: {pool.k.shape=}, a page has {tile}, {2 * tile} ... 128")
    words = 5 * sum(items.index.shape[0] for items in work.items)
    words += math.prod(work.pages.shape[1:]) + math.prod(work.length.shape[1:])
    if 4 * words > _SMEM_BYTES:
        raise NotImplementedError(f"on TPU: {work.pages.shape=} and {words=} do not fit in SMEM")


def _pages_in_flight(pool: Pages, work: WorkList, heads: int) -> tuple[int, int, int]:
    """Pages of a block, blocks in flight, and the bytes of them all."""
    p, d = pool.k.shape[3:]
    page_bytes = 2 * heads * p * _round_up(d, LANES) * pool.k.dtype.itemsize
    pages = max([1, *(items.max_pages for items in work.items)])
    pages = max(1, min(pages, _BLOCK_TOKENS // p, _PAGE_BYTES // (2 * page_bytes)))
    slots = max(2, min(4, _PAGE_BYTES // (pages * page_bytes)))
    return pages, slots, slots * pages * page_bytes


def _row_bytes(d: int, heads: int) -> int:
    """VMEM of a row: q and out of every head in two float32 buffers each, its lse, its position."""
    return 4 * (heads * (4 * _round_up(d, LANES) + LANES) + 2 * LANES)


def _rows_of(queries: int, group: int) -> tuple[int, int]:
    """Rows that a run of queries may touch, in whole tiles wherever it begins; pieces of them."""
    touched = _round_up(queries * group + SUBLANES - math.gcd(SUBLANES, group), SUBLANES)
    count = -(-touched // _PIECE_ROWS)
    return count * _round_up(-(-touched // count), SUBLANES), count


def _pieces(start: int, rows: int, count: int, heads: int) -> ClassSizes:
    most = max(1, _PIECE_ROWS // (rows // count))
    piece_heads = next(n for n in range(min(heads, most), 0, -1) if heads % n == 0)
    return ClassSizes(start=start, rows=rows, piece_rows=rows // count, piece_heads=piece_heads)


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to
