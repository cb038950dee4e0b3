"""The TPU kernel of window_scores, interpreted, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from observed import observed

from kvjax.pallas_kernels.window_scores import api, tpu, window_scores


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    kernel = functools.partial(tpu.token_scores_tpu, interpret=True)
    monkeypatch.setattr(api, "token_scores_tpu", kernel)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"A": 3, "H": 4, "C": 1, "late": 5},
        {"tracked": True, "late": 9, "P": 48, "M": 7},
        {"holes": True, "dtype": "float32", "P": 8, "D": 72, "M": 90, "B": 2},
    ],
    ids=str,
)
def test_against_the_reference(sizes):
    call = observed(**sizes)
    got, want = (
        jax.jit(functools.partial(window_scores, implementation=name))(*call)
        for name in ("tpu", "reference")
    )
    # Products of bfloat16 are exact in float32, and both sum in float32.
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-9)
    assert np.asarray(want).any()


def test_no_two_copies_meet(monkeypatch):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    monkeypatch.setattr(tpu, "_BLOCK", 128)
    params = pltpu.InterpretParams(detect_races=True)
    kernel = functools.partial(tpu.token_scores_tpu, interpret=params)
    monkeypatch.setattr(api, "token_scores_tpu", kernel)
    call = observed(B=2, M=36, K=2, H=2, A=8)
    got = jax.jit(functools.partial(window_scores, implementation="tpu"))(*call)
    want = window_scores(*call, implementation="reference")
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-9)
    assert not interpreter.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [({"P": 8}, "tiles"), ({"A": 4096}, "VMEM"), ({"M": 30000, "P": 16, "K": 1, "D": 8}, "SMEM")],
    ids=str,
)
def test_what_does_not_fit_is_named(sizes, said):
    shapes = jax.eval_shape(functools.partial(shapes_of, **sizes))
    with pytest.raises(NotImplementedError, match=said):
        jax.eval_shape(functools.partial(window_scores, implementation="tpu"), *shapes)


def shapes_of(*, A=8, P=16, K=4, D=64, M=20, B=8):
    from kvjax.cache import KVPool

    plane = jnp.zeros((2, 1, K, P, D), jnp.bfloat16)
    number = functools.partial(jnp.zeros, dtype=jnp.int32)
    return (
        plane[0, 0, 0, 0, 0] * jnp.zeros((B, A, K, D), jnp.bfloat16), jnp.zeros((B, A, K)),
        KVPool(k=plane, v=plane), number(()), number((1, 1, B, M)), number((1, 1, B)),
        number((B, A)),
    )  # fmt: skip
