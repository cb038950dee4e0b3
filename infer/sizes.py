"""The engine's static sizes: which shapes are compiled, and how many pages fit in memory."""

import math
import os

import jax

from kvjax.errors import InputError
from kvjax.infer.engine import cache_config
from kvjax.models.decoder import DecoderConfig
from kvjax.plan import Grid

__all__ = ["choose_grid", "choose_num_pages"]

# Runs of shared pages with fewer tokens are not worth a work item of their own.
_SHARED_TOKENS = 64


def choose_grid(
    length: int, max_rows: int, page_size: int, token_budget: int | None, decode_steps: int,
    shared: bool = False,
) -> Grid:  # fmt: skip
    """Few shapes, since each is a program to compile, for sequences of `length` tokens.

    Args:
        length: tokens of the longest sequence.
        max_rows: that run at a time.
        page_size: tokens of a page.
        token_budget: of a step; None: by the device.
        decode_steps: of a call that only decodes.
        shared: whether pages that rows share are read once for all of them.
    """
    # A CPU is busy with little; an accelerator reads its weights for many tokens at once, and its
    # longer items have fewer partial results to merge.
    cpu = jax.default_backend() == "cpu"
    if token_budget is None:
        token_budget = 512 if cpu else 4096
    budget = max(token_budget, max_rows)
    return Grid(
        page_size=page_size,
        max_rows=max_rows,
        pages_per_row=math.ceil(length / page_size),
        row_buckets=tuple(sorted({n for n in (1, 8) if n < max_rows} | {max_rows})),
        token_buckets=tuple(sorted({min(budget, max(64, max_rows)), budget})),
        split_pages=max(1, (128 if cpu else 1024) // page_size),
        decode_steps=decode_steps,
        shared_pages=max(1, _SHARED_TOKENS // page_size) if shared else 0,
        fixed=jax.default_backend() == "gpu",
    )


def choose_num_pages(model: DecoderConfig, grid: Grid, kv_memory: int | None) -> int:
    """As many pages as fit in `kv_memory` bytes, but no more than all rows can hold.

    Raises:
        InputError: not one fits, or the device has less memory than they take.
    """
    platform, most = jax.default_backend(), grid.max_rows * grid.pages_per_row
    cache = cache_config(model, grid, num_pages=1)
    page, fixed = cache.page_bytes(platform), cache.nbytes(platform) - cache.page_bytes(platform)
    left = _memory_left()
    if kv_memory is None:
        kv_memory = 2**30 if platform == "cpu" or left is None else int(0.9 * left)
    if kv_memory < fixed + page:
        raise InputError(
            f"{kv_memory} bytes of KV memory hold no page: a page of this model needs {page} bytes "
            f"and the table {fixed}; raise the KV memory or lower the rows"
        )
    num_pages = min(most, (kv_memory - fixed) // page)
    if left is not None and (need := fixed + num_pages * page) > left:
        raise InputError(
            f"{need} bytes of KV memory asked for, but {left} are left; lower the KV memory, the "
            "rows or the maximum length"
        )
    return num_pages


def _memory_left() -> int | None:
    """Bytes that the device can still give; on the CPU all that the machine has; None: unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if jax.default_backend() == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
