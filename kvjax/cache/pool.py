"""The page pool: keys and values as arrays of pages, and what is done to them on the device.

Letters: L layers, K KV heads, D head size, N pages in the pool, P tokens a page, R layers and C KV
heads that one page spans, B rows, M pages a row may hold, T tokens of a step.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from kvjax.cache.table import PageTable, Slots
from kvjax.pallas_kernels.page_bounds import append_bounds
from kvjax.pallas_kernels.page_write import page_write

__all__ = [
    "CacheConfig",
    "KVPool",
    "compact",
    "copy_pages",
    "gather",
    "write",
    "write_positions",
]

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVPool:
    """All pages of a cache. A page holds P tokens of R layers and C KV heads.

    Attributes:
        k: [N, R, C, P, D] keys, rotated.
        v: [N, R, C, P, D] values.
        position: int32[N, P] true positions, -1 for a dead slot; None: every page is dense, so a
            token's position is its slot in the row.
        bounds: float32[N, R, C, 3, D], see `pallas_kernels.page_bounds`; `write` keeps them up,
            after a compaction they are to be computed anew. None where nothing selects by them.
        scales: per-token scales of 8-bit pages; None where pages hold k and v as they are.

    Any slot that no row has written may hold anything, NaN included: what reads a pool must not
    let such a slot through.
    """

    k: Array
    v: Array
    position: Array | None = None
    bounds: Array | None = None
    scales: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The static sizes of a cache.

    Attributes:
        num_pages: N.
        page_size: P, tokens.
        num_layers, num_kv_heads, head_dim: L, K, D of the model.
        max_rows: B, rows that can be seated at once.
        pages_per_row: M.
        layers_per_page: R; 0 means L. If R does not divide L, the last group spans fewer layers.
        heads_per_page: C; 0 means K.
        dtype: of the keys and values.
        track_positions: keep the `position` plane, which anything that evicts tokens needs.
    """

    num_pages: int
    page_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_rows: int
    pages_per_row: int
    layers_per_page: int = 0
    heads_per_page: int = 0
    dtype: str = "float32"
    track_positions: bool = False

    def __post_init__(self) -> None:
        if self.num_kv_heads % self.C:
            raise ValueError(f"{self.heads_per_page=} does not divide {self.num_kv_heads=}")

    @property
    def R(self) -> int:
        """Layers that a page spans."""
        return self.layers_per_page or self.num_layers

    @property
    def C(self) -> int:
        """KV heads that a page spans."""
        return self.heads_per_page or self.num_kv_heads

    @property
    def tables(self) -> tuple[int, int]:
        """How many tables a row has: (layer groups L/R, head groups K/C)."""
        return -(-self.num_layers // self.R), self.num_kv_heads // self.C

    def init(self) -> tuple[KVPool, PageTable]:
        """An empty pool and a table without rows."""
        shape = (self.num_pages, self.R, self.C, self.page_size, self.head_dim)
        position = None
        if self.track_positions:
            position = jnp.full((self.num_pages, self.page_size), -1, jnp.int32)
        dtype = jnp.dtype(self.dtype)
        pool = KVPool(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), position=position)
        return pool, PageTable.empty(self)

    def page_bytes(self, platform: str) -> int:
        """Bytes of one page as the device lays it out (`jax.default_backend()` names it)."""
        itemsize = jnp.dtype(self.dtype).itemsize
        tile = (self.page_size, self.head_dim)
        if platform == "tpu":  # a tile is 8 sublanes of 32 bits by 128 lanes
            sublanes = 8 * max(1, 4 // itemsize)
            tile = (-(-tile[0] // sublanes) * sublanes, -(-tile[1] // 128) * 128)
        kv = 2 * self.R * self.C * math.prod(tile) * itemsize
        return kv + (4 * self.page_size if self.track_positions else 0)

    def nbytes(self, platform: str) -> int:
        """Bytes of the pool and its table: what a memory limit has to hold."""
        table = 4 * math.prod(self.tables) * self.max_rows * (self.pages_per_row + 1)
        return self.num_pages * self.page_bytes(platform) + table + 4 * self.max_rows


def write(pool: KVPool, layer: Array, k: Array, v: Array, slots: Slots) -> KVPool:
    """Writes one layer's new keys and values; a slot in page N or above is dropped.

    Args:
        pool: donate it.
        layer: int32 scalar.
        k: [T, K, D].
        v: [T, K, D].
        slots: where each token goes, from `table.slots_of`.
    """
    group = layer // pool.k.shape[1]
    page, offset = slots.page[group], slots.offset[group]
    planes = page_write(pool.k, pool.v, layer, k, v, page, offset)
    bounds = pool.bounds
    if bounds is not None:
        bounds = append_bounds(bounds, layer, k, page, offset)
    return dataclasses.replace(pool, k=planes[0], v=planes[1], bounds=bounds)


def write_positions(pool: KVPool, positions: Array, slots: Slots) -> KVPool:
    """Writes the tokens' true positions, once a step for all layers; a no-op for a dense pool.

    Args:
        pool: donate it.
        positions: int32[T].
        slots: where each token goes.
    """
    if pool.position is None:
        return pool
    value = jnp.broadcast_to(positions[None, None], slots.page.shape)
    plane = pool.position.at[slots.page, slots.offset].set(value, mode="drop")
    return dataclasses.replace(pool, position=plane)


def copy_pages(pool: KVPool, source: Array, target: Array) -> KVPool:
    """Copies whole pages, every plane of them; pairs whose target is N or above are dropped.

    Args:
        pool: donate it.
        source: int32[n] pages, read before anything is written.
        target: int32[n] pages, distinct where they are below N.
    """
    num_pages = pool.k.shape[0]
    source = jnp.minimum(source, num_pages - 1)
    return jax.tree.map(lambda plane: plane.at[target].set(plane[source], mode="drop"), pool)


def gather(pool: KVPool, table: PageTable, rows: Array) -> tuple[Array, Array]:
    """Rows as dense arrays, for a reader that has no use for pages: tests, saving, scoring.

    Args:
        pool: the pages.
        table: of tables [L/R, K/C, B, M].
        rows: int32[n].

    Returns:
        k and v, each [n, L', K, M * P, D] with L' = L rounded up to whole layer groups (layers
        from L on hold anything); slots that are not in use are zero.
    """
    size = pool.k.shape[3]
    pages = table.pages[:, :, rows]  # [L/R, K/C, n, M]
    slot = jnp.arange(pages.shape[-1] * size)[None, None, None]
    live = slot < table.length[:, :, rows, None]  # [L/R, K/C, n, M * P]
    live = live & jnp.repeat(pages < pool.k.shape[0], size, axis=-1)
    return _dense(pool.k, pages, live), _dense(pool.v, pages, live)


def _dense(plane: Array, pages: Array, live: Array) -> Array:
    tokens = plane[jnp.minimum(pages, plane.shape[0] - 1)]  # [L/R, K/C, n, M, R, C, P, D]
    tokens = jnp.transpose(tokens, (2, 0, 4, 1, 5, 3, 6, 7))
    n, g, r, h, c, m, p, d = tokens.shape
    live = jnp.transpose(live, (2, 0, 1, 3)).reshape(n, g, 1, h, 1, m * p, 1)
    tokens = jnp.where(live, tokens.reshape(n, g, r, h, c, m * p, d), jnp.zeros((), plane.dtype))
    return tokens.reshape(n, g * r, h * c, m * p, d)


def compact(pool: KVPool, table: PageTable, rows: Array, keep: Array) -> tuple[KVPool, PageTable]:
    """Evicts tokens: those kept move to the front of their row's pages, in order.

    Pages beyond the new length are no longer referred to; the host gives them up when it has read
    the new lengths. The pool must track positions, since slots stop being positions.

    Args:
        pool: donate it.
        table: donate it.
        rows: int32[n] distinct rows, each the only owner of its pages.
        keep: bool[L/R, K/C, n, M * P] by slot; slots that are not in use are never kept.
    """
    if pool.position is None:
        raise ValueError(
            "compact needs a pool with track_positions=True: slots stop being positions"
        )
    size, num_pages = pool.k.shape[3], pool.k.shape[0]
    pages = table.pages[:, :, rows]  # [g, h, n, M]
    slot = jnp.arange(keep.shape[-1], dtype=jnp.int32)[None, None, None]
    keep = keep & (slot < table.length[:, :, rows, None])
    length = jnp.sum(keep, axis=-1, dtype=jnp.int32)
    source = jnp.argsort(~keep, axis=-1, stable=True)  # kept slots first, in order
    live = slot < length[..., None]
    source_page = jnp.take_along_axis(pages, source // size, axis=-1)
    target_page = jnp.where(live, jnp.repeat(pages, size, axis=-1), num_pages)

    def move(plane: Array, inner: int) -> Array:
        # `inner` axes lie between the page and the token axis.
        index = (slice(None),) * inner
        token = plane[(source_page, *index, source % size)]
        offset = jnp.broadcast_to(slot % size, target_page.shape)
        return plane.at[(target_page, *index, offset)].set(token, mode="drop")

    pool = dataclasses.replace(
        pool, k=move(pool.k, 2), v=move(pool.v, 2), position=move(pool.position, 0)
    )
    first_free = -(-length // size)
    index = jnp.arange(pages.shape[-1], dtype=jnp.int32)[None, None, None]
    pages = jnp.where(index < first_free[..., None], pages, num_pages)
    return pool, dataclasses.replace(
        table,
        pages=table.pages.at[:, :, rows].set(pages),
        length=table.length.at[:, :, rows].set(length),
    )
