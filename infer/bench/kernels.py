"""`kvjax bench kernels`: times `page_attention`, as the engine calls it: a scan over the layers.

`other_kernels` has the cases of the other kernels.

Every layer reads other bytes, so nothing is found in a cache that would not be there in use. Each
layer's number depends on the output before it, so that the layers run one after the other, and no
array is copied for the measurement's sake. The time is that of many calls less that of few, so
what a call costs by itself drops out.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from kvjax.cache import KVPool
from kvjax.errors import InputError
from kvjax.infer.bench.roofline import Rates, Usage
from kvjax.infer.commands.shared import parse_arguments
from kvjax.pallas_kernels.page_attention import Items, WorkList, page_attention, prepare
from kvjax.plan.step import cut_items

__all__ = [
    "BenchKernels",
    "Case",
    "Timing",
    "kernel_cases",
    "main",
    "random_pool",
    "seconds_a_call",
    "seconds_a_layer",
    "time_cudnn",
    "time_kernels",
    "work_of",
]

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A batch to attend with. All rows of a group share their first pages.

    Attributes:
        name: what the case is called.
        groups: rows with the same prefix, and how many such groups there are: (groups, rows).
        prefix: tokens that the rows of a group share; 0: none.
        levels: of a tree below the prefix: how many rows share a node, and its tokens.
        own: tokens of each row besides, or the least and the most of them.
        queries: query tokens a row, its last ones; 1: decoding.
        tile: queries an item, where there are several.
        split: tokens an item, of the rows' own and of the prefix.
        page_size: P.
        heads: H.
        kv_heads: K.
        dim: D.
        layers: of the pool, all in one page.
    """

    name: str
    groups: tuple[int, int]
    prefix: int = 0
    levels: tuple[tuple[int, int], ...] = ()
    own: int | tuple[int, int] = 0
    queries: int = 1
    tile: int = 32
    split: tuple[int, int] = (2048, 1024)
    page_size: int = 16
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    layers: int = 32

    @property
    def rows(self) -> int:
        """All rows."""
        return self.groups[0] * self.groups[1]

    @property
    def shared(self) -> tuple[tuple[int, int], ...]:
        """How many rows share, and how many tokens, from the prefix down."""
        return ((self.groups[1], self.prefix), *self.levels) if self.prefix else self.levels

    @property
    def distinct(self) -> int:
        """Tokens that rows share, each counted once."""
        return sum(self.rows // share * tokens for share, tokens in self.shared)

    def own_lengths(self, rng: np.random.Generator) -> np.ndarray:
        """Each row's own tokens, int[rows]."""
        if isinstance(self.own, int):
            return np.full(self.rows, self.own)
        return rng.integers(self.own[0], self.own[1], size=self.rows, endpoint=True)


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one case took.

    Attributes:
        case: its name.
        microseconds: of one layer.
        terabytes: a second, of distinct keys and values.
        teraflops: a second, of scores and weighted values that the causal rule leaves.
        floor: microseconds that these bytes, or these products if they take longer, need at the
            `Rates` of an H200.
        implementation: whose.
    """

    case: str
    microseconds: float
    terabytes: float
    teraflops: float
    floor: float
    implementation: str

    @classmethod
    def of(cls, case: str, implementation: str, seconds: float, moved: float, flops: float) -> Self:
        """From bytes moved and operations done."""
        floor = max(Usage(flops=flops).seconds(Rates()), Usage(bytes=moved).seconds(Rates()))
        rates = (moved / seconds / 1e12, flops / seconds / 1e12)
        return cls(case, seconds * 1e6, *rates, floor * 1e6, implementation)


def kernel_cases() -> tuple[Case, ...]:
    """The shapes that benchmarks.md reports."""
    decode = [
        Case(
            name=f"decode {rows} x {length}, page {size}",
            groups=(rows, 1),
            own=length,
            page_size=size,
        )
        for size in (16, 64)
        for rows, length in ((64, 8192), (256, 1024), (8, 32768))
    ]
    shared = [
        Case(name="prefix 8192 of 64 rows, own 256", groups=(1, 64), prefix=8192, own=256),
        Case(name="16 prefixes 2048 of 16 rows, own 256", groups=(16, 16), prefix=2048, own=256),
        Case(
            name="prefix 4096 of 256 rows, own 128",
            groups=(1, 256),
            prefix=4096,
            own=128,
            split=(2048, 2048),
        ),
        # A root, 8 levels of nodes of 64 tokens, 4 children in the first three: 64 leaves.
        Case(
            name="tree of 64 leaves",
            groups=(1, 64),
            prefix=2048,
            levels=((16, 64), (4, 64)),
            own=6 * 64,
        ),
    ]
    prefill = [
        Case(
            name=f"prefill 2 x 8192, page {size}",
            groups=(2, 1),
            own=8192,
            queries=8192,
            split=(8192, 0),
            page_size=size,
        )
        for size in (16, 64)
    ]
    engine = [
        Case(
            name=f"decode {rows} x 64..640, 32/8 heads of 64, 16 layers",
            groups=(rows, 1),
            own=(64, 640),
            dim=64,
            layers=16,
        )
        for rows in (64, 256)
    ]
    return (*decode, *shared, *prefill, *engine)


def work_of(case: Case, seed: int = 0) -> tuple[WorkList, int, np.ndarray]:
    """The case's work list, how many pages it needs, and each row's length, int[rows].

    Pages lie in random order. The prefix's items come first.
    """
    rng = np.random.default_rng(seed)
    size, own = case.page_size, case.own_lengths(rng)
    length = own + sum(tokens for _, tokens in case.shared)
    per_row = -(-own // size)
    num_pages = case.distinct // size + int(per_row.sum())
    order = rng.permutation(num_pages).astype(np.int32)
    pages = np.full((case.rows, int(-(-length.max() // size))), num_pages, np.int32)
    taken = start = 0
    for share, tokens in case.shared:
        node = order[taken : taken + case.rows // share * tokens // size].reshape(
            -1, tokens // size
        )
        pages[:, start : start + node.shape[1]] = np.repeat(node, share, 0)
        taken, start = taken + node.size, start + node.shape[1]
    for row, n in enumerate(per_row):
        pages[row, start : start + n] = order[taken : taken + n]
        taken += n
    position = length[:, None] - case.queries + np.arange(case.queries)
    work = WorkList(
        items=tuple(_items(case, length)),
        pages=jnp.asarray(pages)[None, None],
        length=jnp.asarray(length, jnp.int32)[None, None],
        query_position=jnp.asarray(position.reshape(-1), jnp.int32),
    )
    return work, num_pages, length


def _items(case: Case, length: np.ndarray) -> Iterator[Items]:
    """The prefix's items, then one class for all the others."""
    size, start, found = case.page_size, 0, []
    for share, tokens in case.shared:
        first, n = np.arange(0, case.rows, share), tokens // size
        split = case.split[1] // size
        index = cut_items(first, np.full(len(first), n), first, first + share, split)
        index[:, 1:3] += start
        found.append((index, share, min(n, split)))
        start += n
    tiles = -(-case.queries // case.tile)
    offset = np.tile(np.arange(tiles) * case.tile, case.rows)
    last = np.minimum(offset + case.tile, case.queries)
    row = np.repeat(np.arange(case.rows), tiles)
    needed = -(-(length[row] - case.queries + last) // size)
    split, base = case.split[0] // size, row * case.queries
    index = cut_items(row, needed - start, base + offset, base + last, split)
    index[:, 1:3] += start
    found.append((index, min(case.tile, case.queries), split))
    if case.prefix:
        yield _as_items(*found.pop(0))
    index, queries, entries = zip(*found, strict=True)
    yield _as_items(np.concatenate(index), max(queries), max(entries))


def _as_items(index: np.ndarray, max_queries: int, max_pages: int) -> Items:
    return Items(
        index=jnp.asarray(index), count=jnp.int32(len(index)), max_queries=max_queries,
        max_pages=max_pages,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_pool(shape: tuple[int, ...], dtype: str = "bfloat16") -> KVPool:
    """Pages of shape [N, R, C, P, D] with noise in them, made without a second copy."""

    def noise(seed: int) -> Array:
        mixed = jnp.full(shape, seed, jnp.uint32)
        for axis in range(len(shape)):
            mixed = (mixed ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(
                0x9E3779B1
            )
            mixed = mixed ^ (mixed >> 15)
        return (mixed.astype(jnp.float32) * (3.4 / 2**32) - 1.7).astype(dtype)

    return KVPool(k=noise(1), v=noise(2))


def time_kernels(
    cases: tuple[Case, ...] | None = None,
    implementation: str | None = None,
    progress: Callable[[Timing], Any] = lambda timing: None,
) -> list[Timing]:
    """Times the cases one after the other.

    Args:
        cases: None: all of `kernel_cases`.
        implementation: of `page_attention`.
        progress: is told each result.
    """
    timings = []
    for case in kernel_cases() if cases is None else cases:
        timings.append(_time_case(case, implementation))
        progress(timings[-1])
    return timings


def _time_case(case: Case, implementation: str | None) -> Timing:
    work, num_pages, length = work_of(case)
    pool = random_pool((num_pages, case.layers, case.kv_heads, case.page_size, case.dim))
    shape = (case.rows * case.queries, case.heads, case.dim)
    q = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    work = jax.jit(functools.partial(prepare, num_heads=case.heads, implementation=implementation))(
        work, pool
    )

    def attend(number: Array, q: Array, pool: KVPool, work: WorkList) -> Array:
        return page_attention(q, pool, number, work, implementation=implementation)[0]

    seconds = seconds_a_layer(attend, case.layers, q, pool, work)
    return _timing(case, int(length.sum()), seconds, implementation or "default")


def seconds_a_layer(attend: Callable[..., Array], layers: int, *arrays: Any) -> float:
    """The device's time for one layer of a scan of `attend(layer, *arrays)`.

    Args:
        attend: gives some output, and reads other bytes in each layer.
        layers: of the scan.
        arrays: trees of arrays.
    """

    @jax.jit
    def all_layers(*arrays: Any) -> Array:
        def layer(zero: Array, number: Array) -> tuple[Array, None]:
            out = attend(number + zero, *arrays)
            return jnp.where(jnp.abs(out[(0,) * out.ndim]) > 1e9, 1, 0).astype(jnp.int32), None

        return jax.lax.scan(layer, jnp.int32(0), jnp.arange(layers, dtype=jnp.int32))[0]

    return seconds_a_call(functools.partial(all_layers, *arrays)) / layers


def _timing(case: Case, total: int, seconds: float, implementation: str) -> Timing:
    """From a layer's time; `total` is the sum of the rows' lengths."""
    tokens = total - case.rows * sum(tokens for _, tokens in case.shared) + case.distinct
    pairs = case.queries * total - case.rows * case.queries * (case.queries - 1) // 2
    moved = tokens * case.kv_heads * case.dim * 4
    flops = pairs * case.heads * case.dim * 4
    return Timing.of(case.name, implementation, seconds, moved, flops)


def time_cudnn(case: Case) -> Timing | None:
    """Attention of cuDNN to the same tokens in dense arrays, or None if it has none for the case.

    Its keys and values are the same in every repetition; at these sizes they do not fit a cache.
    """
    if case.prefix or not isinstance(case.own, int) or jax.default_backend() != "gpu":
        return None
    keys = jax.random.split(jax.random.key(0), 3)
    query, key = (case.rows, case.queries, case.heads), (case.rows, case.own, case.kv_heads)
    q, k, v = (
        jax.random.normal(seed, (*shape, case.dim), jnp.bfloat16)
        for seed, shape in zip(keys, (query, key, key), strict=True)
    )

    @jax.jit
    def often(q: Array, k: Array, v: Array) -> Array:
        def once(i: Array, q: Array) -> Array:
            with jax.numpy_dtype_promotion("standard"):
                return jax.nn.dot_product_attention(
                    q, k, v, is_causal=case.queries > 1, implementation="cudnn"
                )

        return jax.lax.fori_loop(0, 16, once, q)

    seconds = seconds_a_call(functools.partial(often, q, k, v)) / 16
    return _timing(case, case.rows * case.own, seconds, "cudnn")


def seconds_a_call(call: Callable[[], Any], repeats: int = 5) -> float:
    """The device's time for one call: (time of 4 n calls - time of n) / 3 n, the median."""

    def run(n: int) -> float:
        start = time.perf_counter()
        result = None
        for _ in range(n):
            result = call()
        jax.block_until_ready(result)
        return time.perf_counter() - start

    run(1)
    n = max(1, int(0.03 / run(1)))
    return float(np.median([(run(4 * n) - run(n)) / (3 * n) for _ in range(repeats)]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchKernels:
    """Time the kernels on the device at hand, beside their peers."""

    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")] = ()
    """Parts of the names of the cases to run; nothing: all of them. They need up to 70 GB."""
    implementation: Literal["reference", "gpu", "tpu"] | None = None
    """Of those over pages; nothing: the best one here."""
    peer: Literal["cudnn", "none"] = "cudnn"
    """What else is timed, where it can be."""
    json: bool = False
    """End with one JSON object on stdout."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0."""
    from kvjax.infer.bench.other_kernels import other_cases  # which are timed as those here are

    args = parse_arguments(BenchKernels, "kvjax bench kernels", argv)
    named = {case.name: case for case in (*kernel_cases(), *other_cases())}
    cases = [
        case
        for name, case in named.items()
        if not args.only or any(part in name for part in args.only)
    ]
    if not cases:
        names = "; ".join(named)
        raise InputError(f"no case is called {' or '.join(args.only)}: they are {names}")
    timings = []
    for case in cases:
        for timing in _timings(case, args.implementation, args.peer != "none"):
            timings.append(timing)
            print(_line(timing), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        device = jax.devices()[0].device_kind
        found = [dataclasses.asdict(timing) for timing in timings]
        print(json.dumps({"device": device, "jax": jax.__version__, "timings": found}))
    return 0


def _timings(case: Any, implementation: str | None, peers: bool) -> Iterator[Timing]:
    if not isinstance(case, Case):
        yield from case.timings(implementation, peers)
        return
    yield from time_kernels((case,), implementation)
    peer = time_cudnn(case) if peers else None
    yield from [peer] if peer else []


def _line(timing: Timing) -> str:
    return (
        f"{timing.case:<50} {timing.implementation:<9} {timing.microseconds:9.1f} us "
        f"{timing.terabytes:6.2f} TB/s {timing.teraflops:6.0f} TFLOP/s, floor {timing.floor:.1f} us"
    )
