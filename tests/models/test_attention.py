"""Attention of whole sequences: which implementation runs, and what windows mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from kvjax.models import causal_attend


def inputs(length=10, size=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, length, heads, size)), dtype)  # noqa: E731
    return draw(4), draw(2), draw(2)


def attend(windows, *qkv):
    out, state = causal_attend(windows)(jnp.int32(1), *qkv, "state")
    assert state == "state"
    return out


def plain(q, k, v, window):
    """float64, a query and a head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for row, place, head in np.ndindex(q.shape[:3]):
        seen = slice(max(0, place + 1 - window) if window else 0, place + 1)
        scores = k[row, seen, head // 2] @ q[row, place, head] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[row, place, head] = weights / weights.sum() @ v[row, seen, head // 2]
    return out


@pytest.mark.parametrize("window", [0, 1, 3, 10])
@pytest.mark.parametrize("static", [True, False])
# float32 rounding, and bfloat16's 8 bits of numbers up to 3.
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_windows(window, static, dtype, atol):
    qkv = inputs(dtype=dtype)
    out = attend(window if static else jnp.asarray([7, window], jnp.int32), *qkv)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), plain(*qkv, window), atol=atol)


@pytest.mark.parametrize(
    ("windows", "options", "expected"),
    [
        (None, {"dtype": jnp.bfloat16}, {"cudnn", "xla"}),
        (3, {"dtype": jnp.float16}, {"cudnn", "xla"}),
        (jnp.asarray([0, 3]), {"dtype": jnp.bfloat16}, {"cudnn", "xla"}),
        (jnp.asarray([0, 3]), {"dtype": jnp.bfloat16, "length": 9}, {"cudnn", "xla"}),
        (None, {"dtype": jnp.bfloat16, "length": 9}, {"cudnn", "xla"}),
        (None, {"dtype": jnp.bfloat16, "size": 12}, {"xla"}),
        (None, {"dtype": jnp.bfloat16, "size": 136}, {"xla"}),
        (None, {"dtype": jnp.float32}, {"xla"}),
    ],
)
def test_what_cudnn_takes_is_offered_to_it(monkeypatch, windows, options, expected):
    """Both are traced, and the platform takes one of them when the program is lowered."""
    original, asked = jax.nn.dot_product_attention, set()

    def record(*args, implementation, **rest):
        asked.add(implementation)
        return original(*args, implementation="xla", **rest)

    def cudnn(q, *args, **rest):
        asked.add("cudnn")
        return q, jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", cudnn)
    jax.jit(lambda *qkv: attend(windows, *qkv))(*inputs(**options))
    assert asked == expected


def test_without_cuda_the_plain_one_runs(monkeypatch):
    def refuse(*args, **rest):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", refuse)
    qkv = inputs(dtype=jnp.bfloat16)
    np.testing.assert_allclose(
        jax.jit(lambda *qkv: attend(None, *qkv))(*qkv).astype(jnp.float32),
        plain(*qkv, 0),
        atol=0.03,
    )  # bfloat16's 8 bits
