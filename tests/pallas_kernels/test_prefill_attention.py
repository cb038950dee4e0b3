"""Causal attention of whole sequences: outputs, lse and gradients against a float64 reading.

The way through cuDNN runs here with XLA in cuDNN's place: what is tested is the padding around it.
Splash attention runs in an interpreter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from kvjax.pallas_kernels.prefill_attention import prefill_attention
from kvjax.pallas_kernels.prefill_attention.gpu import prefill_attention_cudnn
from kvjax.pallas_kernels.prefill_attention.tpu import prefill_attention_splash


def inputs(length, dtype=jnp.float32, heads=4, size=16):
    rng = np.random.default_rng(length)
    return [
        jnp.asarray(2 * rng.normal(size=(2, length, n, size)), dtype)
        for n in (heads, heads // 2, heads // 2)
    ]


def plain(q, k, v, window, scale):
    """Outputs [B, T, H, D] and lse [B, T, H] in float64, a row of scores at a time."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    for row, place, head in np.ndindex(q.shape[:3]):
        seen = slice(max(0, place + 1 - window) if window else 0, place + 1)
        kv = head * k.shape[2] // q.shape[2]
        scores = scale * k[row, seen, kv] @ q[row, place, head]
        lse[row, place, head] = np.logaddexp.reduce(scores)
        out[row, place, head] = np.exp(scores - lse[row, place, head]) @ v[row, seen, kv]
    return out, lse


def xla_for_cudnn(monkeypatch):
    def instead(q, k, v, *, scale, return_residual, mask_type, sliding_window_length):
        assert (
            mask_type is fused_attention_stablehlo.MaskType.CAUSAL
            and return_residual
            and q.shape[1] % 128 == 0
        )
        window = (sliding_window_length - 1, 0) if sliding_window_length else None
        out, lse = jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, local_window_size=window, return_residual=True
        )
        return out, jnp.swapaxes(lse, 1, 2)

    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", instead)


def ways(name, monkeypatch):
    if name == "cudnn":
        xla_for_cudnn(monkeypatch)
        return lambda q, k, v, window, scale: prefill_attention_cudnn(q, k, v, window, scale)
    if name == "splash":
        return functools.partial(prefill_attention_splash, interpret=True)
    return lambda q, k, v, window, scale: prefill_attention(q, k, v, window=window, scale=scale)


@pytest.mark.parametrize(("name", "length"), [("reference", 11), ("cudnn", 11), ("splash", 128)])
@pytest.mark.parametrize("window", [0, 3])
def test_outputs_and_lse(monkeypatch, name, length, window):
    qkv = inputs(length)
    # JAX's own kernel mixes dtypes when it is interpreted.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out, lse = ways(name, monkeypatch)(*qkv, window, 0.3)
    expected, expected_lse = plain(*qkv, window, 0.3)
    assert lse.dtype == jnp.float32
    # float32 sums of numbers up to 10.
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_window_may_be_data(dtype):
    qkv = inputs(9, dtype)
    out, lse = jax.jit(lambda w: prefill_attention(*qkv, window=w))(jnp.int32(4))
    expected, expected_lse = plain(*qkv, 4, 0.25)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    # bfloat16 keeps 8 bits of outputs up to 5; scores are summed in float32 in both.
    atol = 2e-5 if dtype == jnp.float32 else 0.03
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=atol)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "length"), [("cudnn", 70), ("splash", 128)])
def test_gradients_are_the_references(monkeypatch, name, length):
    qkv = inputs(length)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=qkv[0].shape), jnp.float32)

    def loss(way, *qkv):
        return jnp.sum(weight * way(*qkv, 5, 0.25)[0])

    expected = jax.grad(functools.partial(loss, ways("reference", monkeypatch)), (0, 1, 2))(*qkv)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        way = ways(name, monkeypatch)
        found = jax.jit(jax.grad(functools.partial(loss, way), (0, 1, 2)))(*qkv)
    for a, b in zip(found, expected, strict=True):
        # Sums of some hundred terms, the largest near 30, in float32.
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_what_a_named_one_cannot_do_is_said():
    q, k, v = inputs(9)
    with pytest.raises(NotImplementedError, match="float32"):
        prefill_attention(q, k, v, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="9"):
        prefill_attention(q, k, v, implementation="splash")
