"""Low-rank adapters: nothing at first, then exactly the product of their factors."""

import jax
import jax.numpy as jnp
import models_for_tests
import numpy as np
import pytest
from flax import nnx

from kvjax.errors import InputError
from kvjax.models import Decoder, DecoderConfig
from kvjax.models.lora import TARGETS, LoRA

ALL = LoRA(rank=3, alpha=6.0, targets=TARGETS)
_, PARAMS = models_for_tests.random_decoder()


def filled(lora, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, lora.init(PARAMS, 0))


def test_a_fresh_adapter_changes_no_bit():
    merged = ALL.merge(PARAMS, ALL.init(PARAMS, 1))
    jax.tree.map(np.testing.assert_array_equal, merged, PARAMS)


@pytest.mark.parametrize("target", TARGETS)
def test_a_merged_product_is_the_product_beside_it(target):
    """x (W + s A B) = x W + s (x A) B, for each target alone; the others stay."""
    lora = LoRA(rank=3, alpha=6.0, targets=(target,))
    adapter = filled(lora)
    merged = lora.merge(PARAMS, adapter)
    kernel, new = (p["blocks"][target]["kernel"][...] for p in (PARAMS, merged))
    a, b = adapter[target]["a"], adapter[target]["b"]
    inputs = a.ndim - 2
    rng = np.random.default_rng(1)
    for layer in range(3):
        x = rng.normal(0, 1, (5, *a.shape[1:-1])).astype(np.float32)
        axes = inputs, inputs
        beside = np.tensordot(x, kernel[layer], inputs)
        beside = beside + 2.0 * np.tensordot(np.tensordot(x, a[layer], inputs), b[layer], 1)
        # The same sums of float32 in another order.
        np.testing.assert_allclose(np.tensordot(x, new[layer], axes[0]), beside, atol=1e-5)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), merged, PARAMS)
    assert jax.tree.leaves(same).count(False) == 1


def test_the_released_shape_has_as_many_parameters_as_published():
    config = DecoderConfig(
        vocab_size=128_256, num_layers=16, embed_dim=2048, mlp_dim=8192, num_heads=32,
        num_kv_heads=8, head_dim=64, max_positions=131_072, tie_embeddings=True,
    )  # fmt: skip
    shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[1]
    adapter = jax.eval_shape(lambda: LoRA().init(shapes, 0))
    assert sum(x.size for x in jax.tree.leaves(adapter)) == 425_984


def test_settings_that_cannot_be_used_are_refused():
    for wrong in ({"rank": 0}, {"targets": ()}, {"targets": ("q", "q")}, {"targets": ("head",)}):
        with pytest.raises(InputError):
            LoRA(**wrong)
