"""The cross-entropy in chunks is the plain one, and so is its gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.errors import InputError
from kvjax.models import Decoder, DecoderConfig
from kvjax.train.losses import cross_entropy, next_token_loss
from kvjax.train.remat import REMAT, layer_remat

CONFIG = DecoderConfig(
    vocab_size=40, num_layers=3, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8,
    max_positions=32, windows=(4, 0, 0),
)  # fmt: skip


def plain(hidden, kernel, targets, weights):
    logits = jnp.einsum("bte,ev->btv", hidden, kernel, precision="highest").astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = jnp.where(jnp.argmax(logits, -1) == targets, weights, 0)
    return jnp.sum(nats * weights), jnp.sum(right)


def inputs(rows, length, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(rows, length, 8)), dtype),
        jnp.asarray(rng.normal(size=(8, 24)), dtype),
        jnp.asarray(rng.integers(0, 24, (rows, length)), jnp.int32),
        jnp.asarray(rng.integers(0, 2, (rows, length)), jnp.float32),
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=5)
@given(
    rows=st.integers(1, 3), length=st.sampled_from([1, 4, 6, 7]), chunk=st.integers(1, 24),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_chunks_change_neither_the_sum_nor_the_gradient(rows, length, chunk, seed):
    args = inputs(rows, length, seed)
    both = [
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(*args)
        for f in (lambda *a: cross_entropy(*a, chunk), plain)
    ]
    # Sums in another order, in float32, of some twenty numbers up to ten.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), *both)
    # Without a gradient there is less to compute, and the same to find.
    np.testing.assert_allclose(cross_entropy(*args, chunk)[0], both[1][0][0], rtol=2e-5, atol=2e-5)


def test_the_gradient_follows_what_the_loss_is_multiplied_with():
    args = inputs(2, 4)
    one, three = (
        jax.grad(lambda h, k=k: k * cross_entropy(h, *args[1:])[0])(args[0]) for k in (1.0, 3.0)
    )
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    args = inputs(2, 6, dtype=jnp.bfloat16)
    value, grads = jax.jit(jax.value_and_grad(lambda *a: cross_entropy(*a)[0], argnums=(0, 1)))(
        *args
    )
    wide = tuple(x.astype(jnp.float32) for x in args[:2])
    expected, exact = jax.value_and_grad(lambda *a: plain(*a)[0], argnums=(0, 1))(*wide, *args[2:])
    # The products of the inputs are exact in float32, so the loss is too.
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(grads, exact, strict=True):
        assert got.dtype == jnp.bfloat16
        # The gradient of the logits is rounded to bfloat16's 8 bits, and so is the result.
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0.02, atol=0.03)


def test_logits_live_a_chunk_at_a_time():
    shapes = (1, 4096, 8), (8, 1024)
    hidden, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    targets = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, 4096), jnp.float32)
    grad = lambda chunk: jax.jit(  # noqa: E731
        jax.grad(lambda h, k, t, w: cross_entropy(h, k, t, w, chunk)[0], argnums=(0, 1))
    )
    memory = [
        grad(chunk).lower(hidden, kernel, targets, weights).compile().memory_analysis()
        for chunk in (4096, 256)
    ]
    assert memory[1].temp_size_in_bytes < memory[0].temp_size_in_bytes / 4


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_next_tokens_of_a_decoder(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    graph, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, 13)), jnp.int32)
    even = jax.tree.map(jnp.zeros_like, params)
    loss = jax.jit(next_token_loss(graph))
    sums = loss(even, tokens)
    np.testing.assert_allclose(sums.loss / sums.weight, np.log(40), rtol=1e-6)
    assert (sums.weight, sums.metrics["accuracy"]) == (24, 0)
    assert 0 < loss(params, tokens).loss < 24 * 10


@pytest.mark.slow
@pytest.mark.parametrize(("name", "unroll"), [("dots", 1), ("layer", True)])
def test_rematerialisation_changes_no_gradient(name, unroll):
    graph, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, 13)), jnp.int32)
    kept, again = (
        jax.jit(jax.grad(lambda p, f=f: f(p, tokens).loss))(params)
        for f in (
            next_token_loss(graph),
            next_token_loss(graph, remat=name, unroll=unroll),
        )
    )
    # The same operations, fused in other groups: float32 rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), kept, again)


@pytest.mark.slow
def test_rematerialisation_saves_memory():
    config = dataclasses.replace(CONFIG, num_layers=8, max_positions=128, windows=())
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((8, 129), jnp.int32)

    def bytes_of(name):
        loss = lambda p, t: next_token_loss(graph, remat=name)(p, t).loss  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, layer = map(bytes_of, REMAT)
    assert none > 1.2 * dots > 1.2 * 1.2 * layer


def test_unknown_rematerialisation_is_said():
    with pytest.raises(InputError, match="remat is 'some': use one of none, dots, layer"):
        layer_remat("some")
