"""FLOPs counted by hand, and the devices' peaks."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from kvjax.models import Decoder, DecoderConfig
from kvjax.train.bench import BENCH_MODEL
from kvjax.train.flops import decoder_step_flops, matrix_parameters, peak_flops

CONFIG = DecoderConfig(
    vocab_size=10, num_layers=2, embed_dim=4, mlp_dim=6, num_heads=2, num_kv_heads=1, head_dim=3,
    max_positions=8,
)  # fmt: skip


def test_parameters_in_products_are_all_but_the_table_and_the_norms():
    for config in (CONFIG, BENCH_MODEL):
        shapes = nnx.state(nnx.eval_shape(lambda c=config: Decoder(c, rngs=nnx.Rngs(0))))
        everything = sum(x.size for x in jax.tree.leaves(shapes))
        norms = (2 * config.num_layers + 1) * config.embed_dim
        table = config.vocab_size * config.embed_dim
        assert matrix_parameters(config) == everything - norms - table


def test_flops_by_hand():
    # A layer: q 4x6, k and v 4x3, out 6x4, three of 4x6; two layers; the output layer 4x10.
    products = 2 * (24 + 12 + 12 + 24 + 72) + 40
    assert matrix_parameters(CONFIG) == products
    # Five tokens see 1 + 2 + 3 + 4 + 5 keys; 2 heads of 3 channels in 2 layers.
    attention = 12 * 2 * 3 * 15 * 2
    assert decoder_step_flops(CONFIG, 7, 5) == 7 * (6 * products * 5 + attention)
    # Logits for two of the five.
    assert decoder_step_flops(CONFIG, 1, 5, 2) == 6 * (products - 40) * 5 + 6 * 40 * 2 + attention
    # A window of 2 in one layer: 1 + 2 + 2 + 2 + 2.
    narrow = dataclasses.replace(CONFIG, windows=(2, 0))
    assert decoder_step_flops(CONFIG, 1, 5) - decoder_step_flops(narrow, 1, 5) == 12 * 6 * (15 - 9)


def test_flops_are_those_that_xla_counts():
    """XLA counts the forward pass of one layer of products: twice the parameters a token."""
    config = dataclasses.replace(CONFIG, num_layers=1, embed_dim=64, mlp_dim=256, vocab_size=512)
    x = np.ones((16, 64), np.float32)
    kernels = [np.ones(s, np.float32) for s in ((64, 6), (64, 3), (64, 3), (64, 6))]
    kernels += [np.ones((64, 256), np.float32)] * 3 + [np.ones((64, 512), np.float32)]
    compiled = jax.jit(lambda x, ks: [x @ k for k in ks]).lower(x, kernels).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(
        2 * 16 * matrix_parameters(config), rel=0.01
    )


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 783e12),
        ("NVIDIA H100 80GB HBM3", 783e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak
