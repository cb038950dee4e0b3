"""Products of few rows: what needs no GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.pallas_kernels.devices import HOPPER_MULTIPROCESSORS
from kvjax.pallas_kernels.few_rows import gated_product, product
from kvjax.pallas_kernels.few_rows.gpu import tiling_for


def test_by_hand():
    x = jnp.asarray([[1.0, 2.0], [0.0, -1.0]])
    np.testing.assert_array_equal(product(x, jnp.asarray([[3.0], [4.0]])), [[11.0], [-4.0]])
    gates = jnp.asarray([[[0.0, 100.0], [5.0, 7.0]], [[0.0, 0.0], [1.0, 1.0]]])
    # silu(0) is 0 and silu(100) is 100; the second row's gates are 0.
    np.testing.assert_array_equal(gated_product(x, gates), [[0.0, 900.0], [0.0, 0.0]])


def test_leading_axes_are_rows():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    w = jax.random.normal(jax.random.key(1), (8, 2, 5))
    whole = gated_product(x, w)
    assert whole.shape == (2, 3, 5)
    np.testing.assert_allclose(whole[1], gated_product(x[1], w), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [(129, (64, 64), "bfloat16"), (4, (96, 64), "bfloat16"), (4, (64, 64), "float32")],
)
def test_what_the_kernel_does_not_take(rows, shape, dtype):
    x, w = jnp.zeros((rows, shape[0]), dtype), jnp.zeros(shape, dtype)
    with pytest.raises(NotImplementedError, match="does not take"):
        product(x, w, implementation="gpu")
    assert product(x, w).shape == (rows, shape[1])


@given(st.integers(1, 256), st.integers(1, 512))
def test_every_multiprocessor_reads_about_as_much(steps, tiles):
    """No other cut of as wide columns would make the busiest one read half as much."""
    depth, columns = 64 * steps, 64 * tiles
    tiling = tiling_for(depth, columns)
    assert columns % tiling.columns == 0
    assert 1 <= tiling.splits <= steps
    units = columns // tiling.columns * tiling.splits
    busiest = -(-units // HOPPER_MULTIPROCESSORS) * -(-steps // tiling.splits)
    least = columns // tiling.columns * steps / HOPPER_MULTIPROCESSORS
    assert busiest <= 2 * least + 8 or steps / 8 > least
