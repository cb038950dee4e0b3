"""The GPU kernel of few_rows on a Hopper GPU, against float32 products. Elsewhere it skips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.devices import on_hopper
from kvjax.pallas_kernels.few_rows import gated_product, product

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")]


def random(seed, *shape, scale=1.0):
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(jnp.bfloat16)


def named(value):
    """A function's address would differ between workers."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("rows", [1, 16, 64, 65, 128])
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (product, (64, 64)),
        (product, (2048, 2048)),
        (product, (2048, 3072)),
        (product, (8192, 2048)),
        (product, (320, 192)),
        (product, (4096, 32064)),
        (gated_product, (2048, 2, 8192)),
        (gated_product, (576, 2, 1536)),
        (gated_product, (4096, 2, 14336)),
    ],
    ids=named,
)
def test_against_float32(rows, function, shape):
    x, w = random(0, rows, shape[0]), random(1, *shape, scale=shape[0] ** -0.5)
    run = {name: jax.jit(functools.partial(function, implementation=name)) for name in
           ("gpu", "reference")}  # fmt: skip
    got = np.asarray(run["gpu"](x, w), np.float32)
    want = np.asarray(run["reference"](x.astype(jnp.float32), w.astype(jnp.float32)))
    # Summed in float32, rounded to bfloat16 once.
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(
    ("function", "shape"),
    [(product, (2048, 3072)), (gated_product, (2048, 2, 8192))],
    ids=named,
)
def test_rows_do_not_depend_on_how_many_there_are(function, shape):
    x, w = random(0, 128, shape[0]), random(1, *shape, scale=shape[0] ** -0.5)
    run = jax.jit(functools.partial(function, implementation="gpu"))
    everyone = np.asarray(run(x, w), np.float32)
    for rows in (1, 17, 64, 100):
        np.testing.assert_array_equal(np.asarray(run(x[:rows], w), np.float32), everyone[:rows])
    np.testing.assert_array_equal(np.asarray(run(x, w), np.float32), everyone)
