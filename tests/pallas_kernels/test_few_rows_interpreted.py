"""The GPU kernel of few_rows, interpreted on any machine, against float32 products; no races."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.few_rows.gpu import Tiling, gated_parts_gpu, product_parts_gpu

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernel and its interpreter need jax 0.11"
)

STREAM = "kvjax.pallas_kernels.few_rows.gpu_stream"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch, capsys):
    """Interpreted, with a ring of two places, which every case goes around several times."""
    monkeypatch.setattr(f"{STREAM}._RING_BYTES", 2 * 2 * 64 * (64 + 128))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    assert "RACE" not in capsys.readouterr().out


def random(seed, *shape, scale=1.0):
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("rows", "shape", "tiling"),
    [
        (5, (640, 64), Tiling(columns=64, splits=2)),
        (64, (256, 256), Tiling(columns=128)),
        (70, (448, 128), Tiling(columns=64, splits=2)),
    ],
    ids=str,
)
def test_parts_add_to_the_product(rows, shape, tiling):
    x, w = random(0, rows, shape[0]), random(1, *shape, scale=shape[0] ** -0.5)
    parts = np.asarray(product_parts_gpu(x, w, tiling))
    assert parts.shape == (tiling.splits, -(-rows // 64) * 64, shape[1])
    want = np.asarray(x, np.float32) @ np.asarray(w, np.float32)
    np.testing.assert_allclose(parts.sum(0)[:rows], want, rtol=0, atol=1e-5)
    assert not parts[:, rows:].any()


def test_gated():
    x, w = random(0, 20, 192), random(1, 192, 2, 128, scale=192**-0.5)
    gate, up = np.moveaxis(
        np.einsum("mk,kgf->mgf", *(np.asarray(a, np.float32) for a in (x, w))), 1, 0
    )
    got = np.asarray(gated_parts_gpu(x, w), np.float32)[:20]
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=2**-8, atol=1e-3)
