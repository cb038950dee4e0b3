"""Weights of our own models come back as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.errors import InputError
from kvjax.models.weights import load_weights, parameter_names, save_weights


class Tiny(nnx.Module):
    def __init__(self, size=3):
        self.layers = nnx.List([nnx.Linear(2, size, rngs=nnx.Rngs(0))])
        self.scale = nnx.Param(jnp.full(2, 1 / 3))


def test_weights_come_back(tmp_path):
    params = nnx.state(Tiny())
    assert parameter_names(params) == ["layers.0.bias", "layers.0.kernel", "scale"]
    save_weights(tmp_path / "new" / "a.safetensors", params)
    back = load_weights(tmp_path / "new" / "a.safetensors", params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    save_weights(tmp_path / "b.safetensors", params, dtype="bfloat16")
    short = load_weights(tmp_path / "b.safetensors", params)
    assert short["scale"].dtype == jnp.float32
    np.testing.assert_allclose(short["scale"], params["scale"][...], rtol=2**-8)
    assert short["scale"][0] != params["scale"][0]


def test_what_does_not_fit_is_said_in_one_line(tmp_path):
    path = tmp_path / "a.safetensors"
    save_weights(path, nnx.state(Tiny()))
    with pytest.raises(InputError, match=r"'layers.0.bias' is \(3,\), not \(4,\)"):
        load_weights(path, nnx.state(Tiny(4)))
    one = nnx.State({"scale": nnx.Param(jnp.zeros(2))})
    with pytest.raises(InputError, match=r"holds 'layers.0.bias', which the model has not"):
        load_weights(path, one)
    save_weights(path, one)
    with pytest.raises(InputError, match=r"'layers\.0\.bias' is missing"):
        load_weights(path, nnx.state(Tiny()))
