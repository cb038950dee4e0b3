"""The TPU kernel of page_write, interpreted, against the reference, to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kvjax.pallas_kernels.page_write import api, page_write, tpu
from kvjax.pallas_kernels.page_write.reference import page_write_reference
from kvjax.pallas_kernels.page_write.tpu import page_write_tpu


def random_call(rng, *, N=40, R=2, C=2, P=16, D=8, J=1, T=50, dtype=jnp.bfloat16):
    """Runs of neighbouring slots and single ones in any order, a fifth of them going nowhere."""
    slots = rng.permutation(N * P)[: J * T].reshape(J, T)
    slots[:, : T // 2] = np.arange(J * (T // 2)).reshape(J, -1) + P // 2
    slots[:, T // 2 :] += J * T
    page, offset = slots // P, slots % P
    page = np.where(rng.random(page.shape) < 0.2, rng.choice([N, 2**31 - 1], page.shape), page)
    page = page[:, rng.permutation(T)] if rng.random() < 0.5 else page
    pools = (jnp.asarray(rng.normal(size=(N, R, C, P, D)), dtype) for _ in range(2))
    new = (jnp.asarray(rng.normal(size=(T, J * C, D)), jnp.float32) for _ in range(2))
    where = (jnp.asarray(x, jnp.int32) for x in (page, offset))
    return *pools, jnp.int32(rng.integers(3 * R)), *new, *where


def check(call, got):
    for x, y in zip(got, page_write_reference(*call), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def sweep(**sizes):
    run = jax.jit(functools.partial(page_write_tpu, interpret=True))
    for seed in range(6):
        call = distinct(random_call(np.random.default_rng(seed), **sizes))
        check(call, run(*call))


def distinct(call):
    """Drops all but the first token of a slot: which of several wins is nobody's promise."""
    *rest, page, offset = call
    page = np.array(page)
    num_pages, size = rest[0].shape[0], rest[0].shape[3]
    slots = page.astype(np.int64) * size + np.asarray(offset)
    _, first = np.unique(slots, return_index=True)
    again = np.ones(page.size, bool)
    again[first] = False
    page[again.reshape(page.shape)] = num_pages
    return *rest, jnp.asarray(page), offset


def test_any_tokens():
    sweep()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"C": 1, "J": 3, "T": 70, "P": 8, "D": 80, "dtype": jnp.float32},
        {"P": 64, "T": 300, "C": 1},
        {"P": 32, "C": 5, "T": 17, "N": 9},
    ],
    ids=str,
)
def test_any_tokens_of_other_shapes(sizes):
    sweep(**sizes)


@pytest.mark.slow
def test_no_two_copies_meet(monkeypatch):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    monkeypatch.setattr(tpu, "_BLOCK", 16)
    monkeypatch.setattr(tpu, "_TILES", 4)
    monkeypatch.setattr(tpu, "_AHEAD", 2)
    params = pltpu.InterpretParams(detect_races=True)
    call = distinct(random_call(np.random.default_rng(0), N=20, R=1, C=1, T=24))
    check(call, jax.jit(functools.partial(page_write_tpu, interpret=params))(*call))
    assert not interpreter.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


def test_two_tokens_and_one_that_goes_nowhere():
    """Literal: tokens 0 and 1 into slots 7 and 0 of page 1, token 2 dropped."""
    pages = jnp.zeros((2, 1, 1, 8, 1))
    new = jnp.array([5.0, 6.0, 7.0]).reshape(3, 1, 1)
    page, offset = jnp.array([[1, 1, 2]]), jnp.array([[7, 0, 3]])
    k, v = page_write_tpu(pages, pages, jnp.int32(0), new, -new, page, offset, interpret=True)
    np.testing.assert_array_equal(k[1, 0, 0, :, 0], [6, 0, 0, 0, 0, 0, 0, 5])
    np.testing.assert_array_equal(v, -k)
    np.testing.assert_array_equal(k[0], 0)


def test_what_does_not_fit_is_named_or_goes_to_the_reference(monkeypatch):
    call = distinct(random_call(np.random.default_rng(0), P=4))
    with pytest.raises(NotImplementedError, match=r"pages\.shape="):
        page_write(*call, implementation="tpu")

    class Tpu:
        platform = "tpu"

    monkeypatch.setattr(api, "default_device", Tpu)
    check(call, page_write(*call))
