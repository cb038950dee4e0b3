"""`frame_attention` and `place_attention` against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.frame_attention import frame_attention, place_attention


def arrays(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def softmax(score, seen):
    score = np.where(seen, score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def oracle(q, k, v, ring_k, ring_v, length, mask):
    """All keys in one array, only those that are there."""
    q, k, v, ring_k, ring_v = (np.asarray(x, np.float64) for x in (q, k, v, ring_k, ring_v))
    k = np.concatenate([ring_k[:, :, :, :length], k], axis=3)
    v = np.concatenate([ring_v[:, :, :, :length], v], axis=3)
    seen = np.concatenate([np.ones((q.shape[3], length), bool), mask], axis=1)
    score = np.einsum("bshid,bshjd->bshij", q, k) / np.sqrt(q.shape[-1])
    return np.einsum("bshij,bshjd->bshid", softmax(score, seen), v)


def test_one_key_is_its_value():
    q, k, v = arrays(*[(1, 1, 1, 1, 4)] * 3)
    np.testing.assert_array_equal(frame_attention(q, k, v), v)


# bfloat16 has 8 bits: inputs are exact, weights and the result are rounded.
@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("length", [0, 1, 5, 7])
def test_a_ring_and_new_frames(length, dtype, tolerance):
    """Every query sees the ring's frames in use and the new ones up to its own."""
    new, held = (2, 3, 2, 4, 72), (2, 3, 2, 7, 72)
    q, k, v, ring_k, ring_v = arrays(new, new, new, held, held, dtype=dtype)
    expected = oracle(q, k, v, ring_k, ring_v, length, np.tri(4, dtype=bool))
    unused = (jnp.arange(7) >= length)[None, None, None, :, None]
    ring_k, ring_v = (jnp.where(unused, jnp.nan, x) for x in (ring_k, ring_v))
    attend = jax.jit(frame_attention)
    out = attend(q, k, v, ring_k, ring_v, length=jnp.int32(length))
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=tolerance)


def test_masks_of_rows():
    q, k, v = arrays(*[(2, 3, 2, 4, 8)] * 3)
    mask = np.stack([np.tri(4, dtype=bool), np.ones((4, 4), bool)])
    out = frame_attention(q, k, v, mask=jnp.asarray(mask))
    for row in (0, 1):
        one = [x[row : row + 1] for x in (q, k, v)]
        expected = oracle(*one, one[1], one[2], 0, mask[row])
        np.testing.assert_allclose(out[row : row + 1], expected, atol=2e-6)


@pytest.mark.slow
def test_gradients_reach_everything():
    """Against the same computed densely; a slot that is not in use gets none."""
    new, held = (1, 2, 1, 3, 4), (1, 2, 1, 5, 4)
    args = arrays(new, new, new, held, held)

    def dense(q, k, v, ring_k, ring_v):
        k, v = (jnp.concatenate([a[:, :, :, :2], b], 3) for a, b in ((ring_k, k), (ring_v, v)))
        seen = jnp.concatenate([jnp.ones((3, 2), bool), jnp.tri(3, dtype=bool)], 1)
        score = jnp.einsum("bshid,bshjd->bshij", q, k) / 2
        weights = jax.nn.softmax(jnp.where(seen[None, None, None], score, -jnp.inf), axis=-1)
        return jnp.einsum("bshij,bshjd->bshid", weights, v)

    loss = lambda f: lambda *args: jnp.sum(jnp.sin(f(*args)))  # noqa: E731
    everything = tuple(range(5))
    ours = jax.grad(loss(lambda *a: frame_attention(*a, length=2)), everything)(*args)
    theirs = jax.grad(loss(dense), everything)(*args)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert not np.any(ours[3][:, :, :, 2:])


def test_wrong_shapes_are_named():
    q, k, ring = arrays((1, 2, 1, 3, 4), (1, 2, 1, 2, 4), (1, 2, 1, 5, 4))
    with pytest.raises(ValueError, match="give three"):
        frame_attention(q, k, k)
    with pytest.raises(ValueError, match="or neither"):
        frame_attention(q, q, q, ring)
    with pytest.raises(ValueError, match="ring_k"):
        frame_attention(q, q, q, ring[:, :1], ring[:, :1])
    with pytest.raises(ValueError, match="mask"):
        frame_attention(q, q, q, mask=jnp.ones((1, 2, 2), bool))
    with pytest.raises(NotImplementedError, match="tpu"):
        frame_attention(q, q, q, implementation="tpu")


def test_places():
    q, k, v = arrays((2, 3, 2, 8), (2, 5, 2, 8), (2, 5, 2, 8))
    mask = jnp.arange(5)[None] < jnp.array([[5], [2]])
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q, k, v))
    score = np.einsum("bqhd,bkhd->bhqk", q64, k64) / np.sqrt(8)
    weights = softmax(score, np.asarray(mask)[:, None, None])
    expected = np.einsum("bhqk,bkhd->bqhd", weights, v64)
    np.testing.assert_allclose(place_attention(q, k, v, mask=mask), expected, atol=2e-6)
    np.testing.assert_allclose(place_attention(q, k, v)[0], expected[0], atol=2e-6)
