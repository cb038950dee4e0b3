"""Beginnings of sequences that are held in the cache, and kept in files between processes."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Branch, OutOfPages, PageTable
from kvjax.errors import InputError
from kvjax.infer.engine import Engine
from kvjax.infer.saved_cache import SavedCache, fingerprint, load_cache, put_pages, save_cache

__all__ = ["Prefix", "check_idle", "load_prefix", "save_prefix"]


class Prefix:
    """The pages of a sequence's beginning: whoever asks for the same beginning finds them.

    They are not given to anybody else until `close`. As a context manager it closes itself.
    """

    def __init__(self, engine: Engine, branch: Branch | None = None) -> None:
        self.engine = engine
        self._branch = branch or Branch()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Those whose keys and values are held, whole pages of them."""
        return tuple(self._branch.tokens)

    @property
    def pages(self) -> tuple[int, ...]:
        """Their pages in the engine's pool."""
        return tuple(self._branch.pages)

    def follow(self, tokens: Sequence[int]) -> None:
        """Holds the pages of another sequence instead, as far as they are in the cache.

        The engine must be idle: a running request counts on the pages that it saw.
        """
        branch = Branch()
        # First the new, then the old: a page of both never becomes one that may be evicted.
        self.engine.planner.trie.match(branch, tokens)
        self.close()
        self._branch = branch

    def cut(self, tokens: Sequence[int]) -> None:
        """Gives up what is no beginning of `tokens`."""
        differs = (i for i, (a, b) in enumerate(zip(self.tokens, tokens, strict=False)) if a != b)
        common = next(differs, min(len(self._branch), len(tokens)))
        size = self.engine.grid.page_size
        self.engine.planner.trie.truncate(self._branch, common // size * size)

    def close(self) -> None:
        """Gives up the pages; they stay in the cache until others need the room."""
        self.engine.planner.trie.release(self._branch)

    def __enter__(self) -> "Prefix":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


def check_idle(engine: Engine) -> None:
    """Refuses to take pages while requests run that were promised theirs.

    Raises:
        InputError: a stream is unfinished.
    """
    if engine.planner.busy:
        raise InputError("an earlier stream of this model is unfinished: end or close it first")


def save_prefix(prefix: Prefix, path: str | Path, note: Mapping[str, Any]) -> None:
    """Writes a prefix, with a note, for `load_prefix`.

    Raises:
        InputError: the file cannot be written.
    """
    engine, tokens, pages = prefix.engine, prefix.tokens, prefix.pages
    shape = (*engine.cache.tables, 1)
    entries = np.full((*shape, engine.cache.pages_per_row), engine.cache.num_pages, np.int32)
    entries[..., : len(pages)] = pages
    table = PageTable(
        pages=jnp.asarray(entries),
        length=jnp.full(shape, len(tokens), jnp.int32),
        position=jnp.full((1,), len(tokens), jnp.int32),
    )
    save_cache(
        path, engine.state.pool, table, config=engine.cache, tokens=[tokens], note=note,
        model=fingerprint(engine.model, engine.params),
    )  # fmt: skip


def load_prefix(engine: Engine, path: str | Path, kind: str) -> tuple[Prefix, dict[str, Any]]:
    """Reads a prefix into the engine's pages, those aside that it already has.

    Args:
        engine: must be idle.
        path: the file.
        kind: what the file's note must say that it is.

    Returns:
        The prefix and the note.

    Raises:
        InputError: the file is damaged, or of another model, or there is no room for its pages.
    """
    check_idle(engine)
    model = fingerprint(engine.model, engine.params)
    saved = load_cache(path, like=engine.cache, model=model)
    if saved.note.get("kind") != kind or len(saved.tokens) != 1:
        other = saved.note.get("kind", "cache")
        raise InputError(f"{path}: holds a saved {other}, not a saved {kind}: give another file")
    if len(saved.tokens[0]) > engine.grid.max_length:
        raise InputError(
            f"{path}: has {len(saved.tokens[0])} tokens but a sequence holds "
            f"{engine.grid.max_length}: raise the maximum length"
        )
    return Prefix(engine, _take_in(engine, path, saved)), saved.note


def _take_in(engine: Engine, path: str | Path, saved: SavedCache) -> Branch:
    trie, tokens, branch = engine.planner.trie, saved.tokens[0], Branch()
    trie.match(branch, tokens)
    try:
        found = len(branch.pages)
        trie.reserve(branch, len(tokens) - len(branch))
        source = np.asarray(saved.table.pages)[0, 0, 0, found : len(branch.pages)]
        planes = jax.tree.map(lambda plane: plane[source], saved.pool)
        pool = put_pages(engine.state.pool, branch.pages[found:], planes)
        engine.state = dataclasses.replace(engine.state, pool=pool)
        # Only now can others find them: what is in them is written.
        trie.settle(branch, tokens[len(branch) :])
    except OutOfPages as e:
        trie.release(branch)
        raise InputError(f"{path}: {e}: raise the KV memory, or close other prefixes") from None
    except BaseException:
        trie.release(branch)
        raise
    return branch
