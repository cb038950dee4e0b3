"""window_scores and prefill_attention on a Hopper GPU, against the reference, which is float32.

Elsewhere these tests skip.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from observed import observed

from kvjax.pallas_kernels.devices import on_hopper
from kvjax.pallas_kernels.prefill_attention import prefill_attention
from kvjax.pallas_kernels.window_scores import window_scores

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")]


# XLA tries its products' tiles on the GPU, which takes longer than all else here.
jit = functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"A": 32, "H": 32, "K": 8, "D": 128, "M": 101}, {}),
        ({"A": 32, "H": 32, "K": 8, "D": 128, "M": 101, "tracked": True, "late": 40}, {}),
        ({"A": 8, "D": 64, "P": 64, "late": 70, "holes": True}, {"window": 8, "top": 3}),
        ({"A": 5, "H": 16, "K": 2, "C": 1, "D": 80, "P": 8, "M": 50}, {"window": 16}),
        ({"A": 128, "H": 4, "K": 4, "D": 256, "P": 128, "B": 9}, {"over_heads": True}),
        ({"A": 64, "H": 14, "K": 2, "D": 96, "P": 32, "tracked": True}, {"scale": 0.3}),
        ({"A": 16, "H": 16, "K": 1, "B": 40, "M": 7, "late": 1}, {}),
    ],
    ids=str,
)
def test_scores_against_the_reference(sizes, options):
    call = observed(**sizes)
    got, want = (
        np.asarray(jit(functools.partial(window_scores, implementation=name, **options))(*call))
        for name in ("gpu", "reference")
    )
    assert want.any()
    # Products of bfloat16 are exact in float32; base-2 exponentials of the hardware are to 2 ulp,
    # of numbers up to 64, whose own last bit is 4e-6.
    np.testing.assert_allclose(got, want, rtol=5e-5, atol=1e-8)


@pytest.mark.parametrize("wanted", ["gpu", "reference"])
def test_scores_where_they_fit_come_from_the_kernel(wanted):
    """None picks as documented: queries that the kernel does not take go to the reference."""
    call = observed(A=16 if wanted == "gpu" else 200, H=2, K=2, M=16)
    text = jax.jit(window_scores).lower(*call).as_text()
    assert ("mosaic_gpu" in text) == (wanted == "gpu")


def dense(length, dim, *, rows=2, heads=8, kv_heads=2):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, length, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=True)]


def forwards_and_backwards(q, k, v, cotangent, *, implementation, window):
    def loss(q, k, v):
        out, lse = prefill_attention(q, k, v, window=window, implementation=implementation)
        return jnp.sum((out * cotangent).astype(jnp.float32)), (out, lse)

    gradients, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return lse, out, *gradients


def check_dense(arguments, window):
    got, want = (
        jit(functools.partial(forwards_and_backwards, implementation=name, window=window))(
            *arguments
        )
        for name in ("cudnn", "reference")
    )
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-3)
    for x, y in zip(got[1:], want[1:], strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        # bfloat16 weights, outputs and gradients.
        assert np.linalg.norm(x - y) < 2e-2 * np.linalg.norm(y)


@pytest.mark.parametrize(
    ("length", "dim", "window"), [(300, 64, 0), (300, 128, 0), (130, 72, 0), (300, 64, 100)]
)
def test_dense_attention_lse_and_gradients(length, dim, window):
    check_dense(dense(length, dim), window)


def test_dense_attention_with_a_window_that_is_data():
    check_dense(dense(256, 64), jnp.int32(100))


def test_gradients_where_all_scores_are_low():
    """Below -88, 64 keys past a whole tile: cuDNN by itself gives no numbers."""
    q, k, v, cotangent = dense(192, 64, heads=2)
    check_dense((-8 * jnp.abs(q), jnp.abs(k) + 2, v, cotangent), 0)
