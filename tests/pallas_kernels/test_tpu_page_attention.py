"""The TPU kernel of page_attention, interpreted, against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kvjax.cache import KVPool
from kvjax.pallas_kernels.page_attention import (
    Items,
    WorkList,
    api,
    page_attention,
    tpu_kernel,
    tpu_sizes,
)
from kvjax.pallas_kernels.page_attention.reference import page_attention_reference
from kvjax.pallas_kernels.page_attention.tpu import page_attention_tpu

# float32: sums in another order. bfloat16: weights are rounded to 8 bits before they meet the
# values, and so is out; the lse never leaves float32.
TOL = {jnp.float32: (1e-5, 1e-5), jnp.bfloat16: (2e-2, 1e-5)}
# Interpreted kernels are large programs that run once.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Case:
    """Static sizes of a random call; letters as in the contract."""

    T: int = 6
    K: int = 2
    G: int = 2
    D: int = 16
    P: int = 8
    L: int = 1
    R: int = 1
    C: int = 2
    M: int = 5
    rows: int = 3
    dtype: type = jnp.float32
    tracked: bool = False
    windowed: bool = False
    soft_cap: float | None = None
    # (room, max_queries, max_pages) of each size class
    classes: tuple = ((6, 4, 4),)


def random_call(rng, case):
    """Any items of any rows and queries, tables with holes, NaN wherever nothing is in use."""
    groups = (-(-case.L // case.R), case.K // case.C)
    num_pages = int(np.prod(groups)) * case.rows * case.M + 2
    pages = rng.permutation(num_pages)[:-2].reshape(*groups, case.rows, case.M)
    length = rng.integers(0, case.M * case.P + 1, (*groups, case.rows))
    live = np.zeros((num_pages, case.P), bool)
    slot = np.arange(case.M * case.P).reshape(case.M, case.P)
    live[pages] = slot < length[..., None, None]
    plane = np.cumsum(rng.integers(1, 3, live.shape), axis=1) + 10 * np.arange(num_pages)[:, None]
    if case.tracked:
        live &= rng.random(live.shape) < 0.8
    shape = (num_pages, case.R, case.C, case.P, case.D)
    k, v = (
        np.where(live[:, None, None, :, None], rng.normal(size=shape), np.nan) for _ in range(2)
    )
    position = jnp.asarray(np.where(live, plane, -1), jnp.int32) if case.tracked else None
    pool = KVPool(k=jnp.asarray(k, case.dtype), v=jnp.asarray(v, case.dtype), position=position)
    holes = rng.random(pages.shape) < 0.1
    pages = np.where(holes, rng.choice([num_pages, 2**31 - 1], pages.shape), pages)
    last = 10 * num_pages if case.tracked else case.M * case.P
    query_position = np.where(rng.random(case.T) < 0.2, -1, rng.integers(0, last, case.T))
    work = WorkList(
        items=tuple(random_items(rng, case, *sizes) for sizes in case.classes),
        pages=jnp.asarray(pages, jnp.int32),
        length=jnp.asarray(length, jnp.int32),
        query_position=jnp.asarray(query_position, jnp.int32),
    )
    q = jnp.asarray(rng.normal(size=(case.T, case.K * case.G, case.D)), case.dtype)
    window = jnp.int32(rng.choice([0, 1, 9])) if case.windowed else None
    return q, pool, jnp.int32(rng.integers(case.L)), work, window


def random_items(rng, case, room, max_queries, max_pages):
    index = np.full((room, 5), 999)
    count = rng.integers(room + 1)
    for i in range(count):
        first, begin = rng.integers(case.M), rng.integers(case.T)
        end = first + rng.integers(max_pages + 1)  # empty items too
        stop = min(case.T, begin + rng.integers(1, max_queries + 1))
        index[i] = rng.integers(case.rows), first, min(end, case.M), begin, stop
    return Items(
        index=jnp.asarray(index, jnp.int32), count=jnp.int32(count),
        max_queries=max_queries, max_pages=max_pages,
    )  # fmt: skip


def attend(case, interpret=True, **options):
    options |= {"soft_cap": case.soft_cap, "scale": case.D**-0.5, "interpret": interpret}
    fast = FAST_COMPILE if interpret is True else None
    return jax.jit(functools.partial(page_attention_tpu, **options), compiler_options=fast)


def check(case, call, got):
    oracle = jax.jit(page_attention_reference, static_argnums=(5, 6))
    want = oracle(*call, case.soft_cap, case.D**-0.5)
    for x, y, tol in zip(got, want, TOL[case.dtype], strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=tol, atol=tol
        )


def sweep(case, **options):
    run = attend(case, **options)
    for seed in range(8):
        call = random_call(np.random.default_rng(seed), case)
        check(case, call, run(*call))


@pytest.fixture
def rolled(monkeypatch):
    """Loops as they are, since an unrolled one takes long to compile, and blocks of a few pages."""
    monkeypatch.setattr(tpu_kernel, "_UNROLL", 1)
    monkeypatch.setattr(tpu_sizes, "_BLOCK_TOKENS", 16)


def test_any_work_list(rolled):
    sweep(Case(windowed=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(L=3, R=2, C=1, K=2, G=1, classes=((5, 1, 3), (4, 4, 5))),
        Case(dtype=jnp.bfloat16, P=16, D=72, G=4, tracked=True, windowed=True, soft_cap=3.0),
        Case(G=16, D=64, tracked=True),
        Case(G=3, D=80, P=48, dtype=jnp.bfloat16, windowed=True),
        Case(K=1, C=1, G=5, D=96, P=16),
        Case(K=3, C=3, D=256, dtype=jnp.bfloat16, P=16),
        Case(K=1, C=1, G=8, D=128, P=128, dtype=jnp.bfloat16, soft_cap=5.0, M=2),
        Case(T=512, rows=64, classes=((40, 500, 2),), K=1, C=1),
    ],
    ids=str,
)
def test_any_work_list_of_other_shapes(case, rolled):
    sweep(case)


@pytest.mark.slow
def test_heads_and_queries_that_do_not_fit_at_once(monkeypatch, rolled):
    """With hardly any VMEM: heads apart, queries in blocks, blocks of one page, small pieces."""
    case = Case(T=200, K=4, C=4, D=128, classes=((9, 1, 3), (9, 40, 5)))
    monkeypatch.setattr(tpu_sizes, "_STATE_BYTES", 1 << 20)
    monkeypatch.setattr(tpu_sizes, "_PAGE_BYTES", 1 << 14)
    monkeypatch.setattr(tpu_sizes, "_PIECE_ROWS", 32)
    q, pool, _, work, _ = random_call(np.random.default_rng(0), case)
    sizes = tpu_sizes.sizes_of(q, pool, work, cores=4)
    assert sizes.heads == 1 and sizes.row_blocks > 1 and sizes.block_pages == 1
    assert sizes.classes[1].piece_rows < sizes.classes[1].rows
    sweep(case, cores=4)


@pytest.mark.slow
def test_pages_fetched_several_at_a_time():
    sweep(Case(M=32, classes=((6, 1, 32),)))


def test_a_row_does_not_depend_on_its_neighbours(rolled):
    """The same bits, whoever else is in the batch and however long."""
    case = Case(classes=((5, 1, 3),))
    call = random_call(np.random.default_rng(1), case)
    work = dataclasses.replace(call[3], query_position=jnp.full((6,), 40, jnp.int32))

    def only(index):
        index = np.concatenate([index, np.full((5 - len(index), 5), 999)])
        count = jnp.int32(np.sum(index[:, 0] < 999))
        items = dataclasses.replace(work.items[0], index=jnp.asarray(index), count=count)
        return dataclasses.replace(work, items=(items,))

    run, mine = attend(case), [[0, 0, 3, 2, 3], [0, 3, 5, 2, 3]]
    alone = run(*call[:3], only(mine), None)
    others = run(*call[:3], only([[1, 0, 2, 1, 2], mine[0], [2, 0, 3, 3, 4], mine[1]]), None)
    assert np.any(np.isfinite(alone[1][2]))
    for x, y in zip(alone, others, strict=True):
        np.testing.assert_array_equal(x[2], y[2])


def test_uniform_scores_average_the_values(rolled):
    """Keys of zero give every key the same weight: the output is the mean, lse the log count."""
    v = jnp.full((4, 1, 1, 8, 2), jnp.nan)
    v = v.at[2, 0, 0].set(jnp.tile(jnp.array([[1.0, 2.0], [3.0, 4.0]]), (4, 1)))
    v = v.at[0, 0, 0, 0].set(jnp.array([20.0, 12.0]))
    items = Items(
        index=jnp.array([[0, 0, 2, 0, 1]]), count=jnp.int32(1), max_queries=1, max_pages=2
    )
    work = WorkList(
        items=(items,), pages=jnp.array([[[[2, 0]]]]), length=jnp.array([[[9]]]),
        query_position=jnp.array([8, -1]),
    )  # fmt: skip
    pool = KVPool(k=jnp.zeros_like(v), v=v, position=None)
    run = attend(Case(D=2))
    out, lse = run(jnp.ones((2, 1, 2)), pool, jnp.int32(0), work, None)
    np.testing.assert_allclose(out[0, 0], [4.0, 4.0], rtol=1e-6)  # (4 * 4 + 20) / 9
    np.testing.assert_allclose(lse[0, 0], np.log(9), rtol=1e-6)
    assert np.all(out[1] == 0) and np.all(np.isneginf(lse[1]))


@pytest.mark.slow
def test_no_copy_is_read_before_it_arrives(rolled):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    case = Case(T=3, M=6, rows=2, tracked=True, classes=((4, 3, 6),))
    q, pool, layer, work, _ = random_call(np.random.default_rng(3), case)
    assert tpu_sizes.sizes_of(q, pool, work, 1).block_pages < 3  # every item has some blocks
    index = jnp.asarray([[0, 0, 6, 0, 1], [1, 0, 3, 1, 2], [1, 3, 6, 1, 2], [0, 0, 5, 0, 3]])
    items = dataclasses.replace(work.items[0], index=index, count=jnp.int32(4))
    work = dataclasses.replace(
        work, items=(items,), length=jnp.full_like(work.length, 46),
        query_position=jnp.full((3,), 1000),
    )  # fmt: skip
    # Copies land when they are awaited, so whoever reads too early finds NaN as well.
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    got = attend(case, params)(q, pool, layer, work, None)
    check(case, (q, pool, layer, work, None), got)
    assert np.all(np.isfinite(got[1]))
    assert not interpreter.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (Case(P=4), r"pool\.k\.shape="),
        (Case(P=8, dtype=jnp.bfloat16), r"pool\.k\.shape="),
        (Case(dtype=jnp.float16), r"q\.dtype="),
        (Case(classes=((1 << 16, 1, 1),)), r"work\.pages\.shape="),
        (Case(T=1 << 16, G=1, D=128, K=1, C=1, classes=((1, 1 << 16, 1),)), r"q\.shape="),
    ],
)
def test_what_does_not_fit_is_named(case, names):
    q, pool, layer, work, _ = random_call(np.random.default_rng(0), case)
    with pytest.raises(NotImplementedError, match=names):
        page_attention(q, pool, layer, work, implementation="tpu")


def test_on_a_tpu_what_does_not_fit_goes_to_the_reference(monkeypatch):
    class Tpu:
        platform = "tpu"

    monkeypatch.setattr(api, "default_device", Tpu)
    call = random_call(np.random.default_rng(0), Case(P=4))
    out, lse = page_attention(*call[:4])
    want, want_lse = page_attention_reference(*call, None, 16**-0.5)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(lse, want_lse)
