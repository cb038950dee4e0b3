"""A cache in a file: the pages of any pool that a table refers to, and that table.

The file is safetensors: the planes of the pool, the arrays of the table, and beside them, as JSON,
the cache's sizes, the model's fingerprint and the rows' tokens. Pages are numbered anew, so a file
is as large as what it holds and fits any pool with pages of the same shape.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvjax.cache import CacheConfig, KVPool, PageTable
from kvjax.errors import InputError

__all__ = ["FORMAT", "SavedCache", "fingerprint", "load_cache", "put_pages", "save_cache"]

FORMAT = 1
"""The version of the files that are written, and the only one that is read."""

# Pages that go to or from the device at a time: a bounded copy, and one program whatever is saved.
_BLOCK = 64
# What must be equal for pages to fit another cache.
_PAGE_SIZES = (
    "page_size", "num_layers", "num_kv_heads", "head_dim", "R", "C", "dtype", "track_positions",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedCache:
    """A cache on the host. All arrays are numpy's.

    Attributes:
        config: the sizes; `num_pages` is how many pages there are, `max_rows` how many rows.
        pool: the pages; slots that no row uses are zero.
        table: the rows; `num_pages` stands where there is no page.
        model: the fingerprint of the model that computed it.
        tokens: of each row, as far as they were given.
        note: JSON values that the writer added.
    """

    config: CacheConfig
    pool: KVPool
    table: PageTable
    model: str
    tokens: tuple[tuple[int, ...], ...]
    note: dict[str, Any]


def save_cache(
    path: str | Path, pool: KVPool, table: PageTable, *, config: CacheConfig, model: str,
    rows: Sequence[int] | None = None, tokens: Sequence[Sequence[int]] = (),
    note: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Writes rows of a cache with the pages that hold their slots in use, and no others.

    The file appears whole or not at all.

    Args:
        path: replaced if it exists.
        pool: with any planes and any page shape.
        table: of this pool, compacted rows and rows that share pages included.
        config: of both.
        model: from `fingerprint`.
        rows: which of the table's; None: all.
        tokens: of each row, for whoever loads them; may be empty.
        note: JSON values to keep with them.

    Raises:
        InputError: the file cannot be written.
    """
    table = jax.tree.map(np.asarray, table)
    if rows is not None:
        table = _of_rows(table, np.asarray(rows, np.int32))
    kept, used, table = _renumber(table, config)
    planes = _fetch(pool, kept)
    _clear(planes, used)
    sizes = dataclasses.replace(config, num_pages=len(kept), max_rows=len(table.position))
    facts = {
        "cache": dataclasses.asdict(sizes),
        "model": model,
        "tokens": [[int(token) for token in row] for row in tokens],
        "note": dict(note or {}),
    }
    _write(Path(path), _named_arrays(planes, table), facts)


def load_cache(
    path: str | Path, *, like: CacheConfig | None = None, model: str | None = None
) -> SavedCache:
    """Reads what `save_cache` wrote, and checks that nothing in the file has changed.

    Args:
        path: the file.
        like: a cache that the pages must fit; None: any.
        model: the fingerprint that the file must have; None: any.

    Raises:
        InputError: the file is missing, damaged or of another format, or its pages do not fit.
    """
    path = Path(path)
    arrays, facts = _read(path)
    config = CacheConfig(**facts["cache"])
    if like is not None:
        _check_sizes(path, config, like)
    if model is not None and facts["model"] != model:
        raise InputError(
            f"{path}: was computed by another model (fingerprint {facts['model'][:12]}, here "
            f"{model[:12]}): load the model that wrote it, or save it again with this one"
        )
    pool, table = _caches(arrays, config)
    tokens = tuple(tuple(row) for row in facts["tokens"])
    return SavedCache(config=config, pool=pool, table=table, model=facts["model"], tokens=tokens,
                      note=facts["note"])  # fmt: skip


def put_pages(pool: KVPool, pages: Sequence[int], planes: KVPool) -> KVPool:
    """Copies pages from the host into a pool.

    Args:
        pool: [N, ...], donated; what it is split over, it stays split over.
        pages: n distinct pages of it.
        planes: [n, ...], numpy, with the same planes.
    """
    shardings = jax.tree.map(lambda plane: plane.sharding, pool)
    put = jax.jit(_put_block, donate_argnums=0, out_shardings=shardings)
    num_pages = pool.k.shape[0]
    for start in range(0, len(pages), _BLOCK):
        target = np.full(_BLOCK, num_pages, np.int32)
        block = pages[start : start + _BLOCK]
        target[: len(block)] = block
        new = jax.tree.map(lambda x, s=start: _padded(x[s : s + _BLOCK]), planes)
        pool = put(pool, target, new)
    return pool


def fingerprint(config: Any, params: Any) -> str:
    """Names a model by its configuration and its weights; any change of either changes it.

    The weights stay on the device: each is read once and summed up there, as integers, so the
    result is the same on every platform and however they are split.

    Args:
        config: a dataclass of plain values.
        params: a tree of arrays, of at most 32 bits an element.

    Returns:
        64 hexadecimal digits.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get(_checksums([leaf for _, leaf in leaves]))
    named = [
        [[str(key.key) for key in path if hasattr(key, "key")], str(leaf.dtype), leaf.shape,
         checksum.tolist()]
        for (path, leaf), checksum in zip(leaves, sums, strict=True)
    ]  # fmt: skip
    return hashlib.sha256(_json([dataclasses.asdict(config), named])).hexdigest()


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(leaf) for leaf in leaves]


def _checksum(x: jax.Array) -> jax.Array:
    """Two sums over mixed elements and places, uint32[2].

    The mixing is one to one, so a single changed element always changes both; that several changes
    cancel, or that elements change places unseen, happens once in about 2^64 times.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    first = _mix(bits ^ place * np.uint32(0x9E3779B1))
    second = (first ^ (first >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32) for mixed in (first, second)])


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: one to one on 32 bits, every bit moves every other."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _of_rows(table: PageTable, rows: np.ndarray) -> PageTable:
    return PageTable(
        pages=table.pages[:, :, rows], length=table.length[:, :, rows],
        position=table.position[rows],
    )  # fmt: skip


def _renumber(table: PageTable, config: CacheConfig) -> tuple[np.ndarray, np.ndarray, PageTable]:
    """The pages with slots in use [n], how many slots are [n], and the table with them as 0..n."""
    size, pages = config.page_size, np.asarray(table.pages)
    first = np.arange(pages.shape[-1], dtype=np.int32) * size
    used = np.clip(np.asarray(table.length)[..., None] - first, 0, size)
    live = (used > 0) & (pages < config.num_pages)
    kept = np.unique(pages[live])
    number = np.searchsorted(kept, pages[live])
    slots = np.zeros(len(kept), np.int32)
    np.maximum.at(slots, number, used[live])  # rows that share a page may use more and less of it
    new = np.full(pages.shape, len(kept), np.int32)
    new[live] = number
    return kept, slots, dataclasses.replace(table, pages=new)


@jax.jit
def _take_block(pool: KVPool, pages: jax.Array) -> KVPool:
    return jax.tree.map(lambda plane: plane[pages], pool)


def _put_block(pool: KVPool, pages: jax.Array, new: KVPool) -> KVPool:
    return jax.tree.map(lambda plane, x: plane.at[pages].set(x, mode="drop"), pool, new)


def _padded(x: np.ndarray) -> np.ndarray:
    return np.pad(x, [(0, _BLOCK - len(x))] + [(0, 0)] * (x.ndim - 1))


def _fetch(pool: KVPool, pages: np.ndarray) -> KVPool:
    """Pages of a pool on the host."""
    out = jax.tree.map(lambda x: np.empty((len(pages), *x.shape[1:]), x.dtype), pool)
    for start in range(0, len(pages), _BLOCK):
        block = pages[start : start + _BLOCK].astype(np.int32)
        taken = _take_block(pool, _padded(block))
        for target, plane in zip(jax.tree.leaves(out), jax.tree.leaves(taken), strict=True):
            target[start : start + len(block)] = np.asarray(plane)[: len(block)]
    return out


def _clear(planes: KVPool, used: np.ndarray) -> None:
    """Empties slots that are not in use: what others once wrote there is nobody's to keep."""
    dead = np.arange(planes.k.shape[3])[None] >= used[:, None]
    for plane in (planes.k, planes.v):
        np.swapaxes(plane, 1, 3)[dead] = 0
    if planes.position is not None:
        np.asarray(planes.position)[dead] = -1


def _named_arrays(pool: KVPool, table: PageTable) -> dict[str, np.ndarray]:
    arrays = {f"pool.{f.name}": getattr(pool, f.name) for f in dataclasses.fields(pool)}
    arrays |= {f"table.{f.name}": getattr(table, f.name) for f in dataclasses.fields(table)}
    return {
        name: np.ascontiguousarray(_stored(array))
        for name, array in arrays.items()
        if array is not None
    }


def _stored(array: np.ndarray) -> np.ndarray:
    """Eight-bit floats as bytes, since the format's numpy reader does not know them."""
    return array.view(np.uint8) if array.dtype.name.startswith("float8") else array


def _caches(arrays: dict[str, np.ndarray], config: CacheConfig) -> tuple[KVPool, PageTable]:
    pool: dict[str, Any] = {
        f.name: arrays.get(f"pool.{f.name}") for f in dataclasses.fields(KVPool)
    }
    table: dict[str, Any] = {
        f.name: arrays[f"table.{f.name}"] for f in dataclasses.fields(PageTable)
    }
    dtype = jnp.dtype(config.dtype)
    pool |= {name: pool[name].view(dtype) for name in ("k", "v")}
    return KVPool(**pool), PageTable(**table)


def _check_sizes(path: Path, config: CacheConfig, like: CacheConfig) -> None:
    for name in _PAGE_SIZES:
        there, here = getattr(config, name), getattr(like, name)
        if there != here:
            what = {"R": "layers_per_page", "C": "heads_per_page"}.get(name, name)
            raise InputError(
                f"{path}: its pages have {what}={there}, those here {what}={here}: load the model "
                "as it was when the file was saved, or save it again"
            )


def _json(value: Any) -> bytes:
    """The same bytes for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> str:
    """A checksum of all that a file holds: damaged pages would only show as odd answers."""
    hashed = hashlib.sha256(_json(facts))
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        hashed.update(_json([name, array.dtype.name, array.shape]))
        hashed.update(array.reshape(-1).view(np.uint8).data)
    return hashed.hexdigest()


def _write(path: Path, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    # One entry, since safetensors writes several in any order: equal caches make equal files.
    header = json.dumps({"format": FORMAT, "digest": _digest(arrays, facts), **facts})
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        try:
            save_file(arrays, part, metadata={"kvjax_cache": header})
            part.chmod(0o644)  # safetensors makes it readable for its owner only
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as e:
        reason = e.strerror if isinstance(e, OSError) else " ".join(str(e).split())
        raise InputError(f"{path}: cannot be written ({reason}): give another path") from None


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the JSON values of a file that is whole."""
    damaged = InputError(f"{path}: is damaged or no saved cache: save it again")
    if not path.is_file():
        raise InputError(f"{path}: no such file: give one that was saved before")
    try:
        with safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {})["kvjax_cache"])
            version, digest = facts.pop("format"), facts.pop("digest")
            if version != FORMAT:
                raise InputError(
                    f"{path}: has format {version}, but this version of kvjax reads format "
                    f"{FORMAT}: save it again with this one"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except InputError:
        raise
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e}): give a readable file") from None
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError):
        raise damaged from None
    if digest != _digest(arrays, facts):
        raise damaged
    return arrays, facts
