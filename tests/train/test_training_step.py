"""The pure step: parts of a batch, clipping, the average, short types."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.errors import InputError
from kvjax.train.step import (
    StepOptions,
    Sums,
    cast_params,
    init_state,
    make_mesh,
    make_step,
    place_batch,
)

PLAIN = StepOptions()
PARAMS = {"w": jnp.asarray([1.0, -2.0, 0.5]), "embed": jnp.asarray([[0.25, 1.0, 2.0]])}


def loss(params, batch):
    """Rows weigh differently, so that a mean of means would be wrong."""
    x, weight = batch["x"], batch["weight"] * batch["scale"]
    out = jnp.tanh(x.astype(params["w"].dtype) * params["w"][None]).astype(jnp.float32)
    row = jnp.sum((out * params["embed"].astype(jnp.float32) - 1) ** 2, axis=-1)
    return Sums(jnp.sum(row * weight), jnp.sum(weight), {"worst": jnp.max(row) * jnp.sum(weight)})


def batch_of(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(rows, 3)).astype(np.float32),
        "weight": rng.integers(0, 5, rows).astype(np.float32) + 1,
        "scale": np.float32(2),  # a scalar goes with every part
    }


def step_once(options=PLAIN, batch=None, optimizer=None, ema=False):
    optimizer = optimizer or optax.sgd(1.0)
    state = init_state(PARAMS, optimizer, ema=ema)
    return make_step(loss, optimizer, options)(state, batch_of(12) if batch is None else batch)


@settings(deadline=None, max_examples=5)
@given(parts=st.sampled_from([2, 3, 4, 6, 12]), seed=st.integers(0, 99))
def test_parts_of_a_batch_add_up_to_the_whole(parts, seed):
    batch = batch_of(12, seed)
    whole, metrics = step_once(batch=batch)
    parted, part_metrics = step_once(StepOptions(microbatches=parts), batch)
    # Sums in another order round differently in float32.
    chex.assert_trees_all_close(whole.params, parted.params, rtol=2e-5, atol=2e-6)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-5)


def test_the_step_is_gradient_descent_on_the_mean():
    batch = batch_of(12)
    mean = lambda p: loss(p, batch).loss / loss(p, batch).weight  # noqa: E731
    value, grads = jax.value_and_grad(mean)(PARAMS)
    state, metrics = step_once(batch=batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - g, PARAMS, grads)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5)
    assert state.step == 1


@pytest.mark.parametrize("clip_norm", [0.1, 1e6])
def test_clipping_is_that_of_optax(clip_norm):
    clipped, metrics = step_once(StepOptions(clip_norm=clip_norm))
    chain = optax.chain(optax.clip_by_global_norm(clip_norm), optax.sgd(1.0))
    expected, plain = step_once(optimizer=chain)
    chex.assert_trees_all_close(clipped.params, expected.params, rtol=1e-6)
    assert metrics["grad_norm"] == plain["grad_norm"] > 0.1  # reported as it was before


def test_the_average_follows_the_parameters():
    optimizer = optax.sgd(1.0)
    step = make_step(loss, optimizer, StepOptions(ema_decay=0.75))
    state = init_state(PARAMS, optimizer, ema=True)
    expected = PARAMS["w"]
    for seed in range(3):
        state, _ = step(state, batch_of(4, seed))
        expected = 0.75 * expected + 0.25 * state.params["w"]
    np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-6)
    assert state.best_params is state.ema
    assert init_state(PARAMS, optimizer).ema is None


def test_the_short_type_computes_and_float32_is_kept():
    seen = []

    def spy(params, batch):
        seen.append(jax.tree.map(lambda x: x.dtype.name, params))
        return loss(params, batch)

    optimizer = optax.adam(1e-4)
    step = make_step(spy, optimizer, StepOptions(compute_dtype="bfloat16", microbatches=2))
    state, metrics = step(init_state(PARAMS, optimizer), batch_of(4))
    assert set(map(str, seen)) == {str({"embed": "float32", "w": "bfloat16"})}
    assert {x.dtype for x in jax.tree.leaves((state.params, metrics))} == {np.dtype("float32")}
    # A step of 1e-4 at 2 is less than bfloat16 can tell (2**-7), and must not be lost.
    assert np.all(np.asarray(state.params["w"]) != np.asarray(PARAMS["w"]))
    chex.assert_trees_all_equal_dtypes(state.params, PARAMS)


def test_whole_numbers_are_not_cast():
    params = cast_params({"table": jnp.arange(3), "w": jnp.ones(2)}, "bfloat16")
    assert (params["table"].dtype, params["w"].dtype) == (jnp.int32, jnp.bfloat16)


def test_the_state_is_donated_and_the_first_parameters_are_not():
    optimizer = optax.adam(0.1)
    state = init_state(PARAMS, optimizer, ema=True)
    make_step(loss, optimizer, StepOptions(ema_decay=0.5))(state, batch_of(2))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not PARAMS["w"].is_deleted()


def test_a_step_compiles_once():
    optimizer = optax.adam(0.1)
    state = init_state(PARAMS, optimizer, mesh=make_mesh())
    step = make_step(loss, optimizer, like=state)
    for seed in range(3):
        state, _ = step(state, place_batch(batch_of(2, seed), make_mesh()))
    assert step._cache_size() == 1


def test_deterministic_changes_no_number_on_a_cpu():
    chex.assert_trees_all_equal(step_once(StepOptions(deterministic=True)), step_once())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatches": 5}, "12 rows cannot be taken in 5 parts"),
        ({"microbatches": 0}, "microbatches is 0"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
    ],
)
def test_options_that_cannot_be_used_are_said(options, message):
    with pytest.raises(InputError, match=message):
        step_once(StepOptions(**options))
    with pytest.raises(InputError, match="needs 99 devices"):
        make_mesh(data=99)
