"""The released adapter's layout: names and shapes are checked, the inert bias stays out."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvjax.errors import InputError
from kvjax.models import DecoderConfig
from kvjax.models.lora import LoRA
from kvjax.models.saffron_files import load_released

CONFIG = DecoderConfig(
    vocab_size=30, num_layers=2, embed_dim=16, mlp_dim=20, num_heads=4, num_kv_heads=2, head_dim=4,
    max_positions=32,
)  # fmt: skip
PREFIX = "base_model.model.model.layers"


def write(folder, **changes):
    """A small adapter as PEFT and the release write it."""
    fields = {"r": 4, "lora_alpha": 4, "target_modules": ["v_proj", "q_proj"], "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(fields | changes))
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(2):
        for name, outputs in (("q", 16), ("v", 8)):
            at = f"{PREFIX}.{layer}.self_attn.{name}_proj"
            for factor, shape in (("A", (4, 16)), ("B", (outputs, 4))):
                tensors[f"{at}.lora_{factor}.weight"] = rng.normal(0, 1, shape).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    bias = rng.uniform(-0.25, 0.25, 30).astype(np.float32)
    np.savez(folder / "bias_and_mask.npz", bias=bias, unseen_mask=np.arange(30) % 2 == 0)
    return tensors, bias


def test_the_factors_are_the_files_own(tmp_path):
    tensors, bias = write(tmp_path)
    lora, params, seen = load_released(tmp_path, CONFIG)
    assert lora == LoRA(rank=4, alpha=4.0, targets=("q", "v"))
    for target, heads in (("q", 4), ("v", 2)):
        factors = params["lora"][target]
        assert factors["a"].shape == (2, 16, 4)
        assert factors["b"].shape == (2, 4, heads, 4)
        for layer in range(2):
            at = f"{PREFIX}.{layer}.self_attn.{target}_proj"
            b, a = (tensors[f"{at}.lora_{x}.weight"] for x in "BA")
            product = np.asarray(factors["a"][layer]) @ np.asarray(factors["b"][layer]).reshape(
                4, -1
            )
            # PEFT's weight is [outputs, inputs]: the transpose of ours.
            np.testing.assert_allclose(product, (b @ a).T, atol=1e-5)
    np.testing.assert_array_equal(seen, np.arange(30) % 2 == 1)
    assert not np.asarray(params["head"]["bias"]).any()
    kept = load_released(tmp_path, CONFIG, inert_bias=True)[1]["head"]["bias"]
    np.testing.assert_array_equal(kept, bias)


def test_the_release_itself_has_the_published_shape(tmp_path):
    """The shapes of Llama Guard 3 1B, with zeros for the numbers."""
    config = DecoderConfig(
        vocab_size=128_256, num_layers=16, embed_dim=2048, mlp_dim=8192, num_heads=32,
        num_kv_heads=8, head_dim=64, max_positions=131_072, tie_embeddings=True,
    )  # fmt: skip
    write(tmp_path)
    tensors = {
        f"{PREFIX}.{layer}.self_attn.{name}_proj.lora_{factor}.weight": np.zeros(shape, np.float32)
        for layer in range(16)
        for name, outputs in (("q", 2048), ("v", 512))
        for factor, shape in (("A", (4, 2048)), ("B", (outputs, 4)))
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    np.savez(
        tmp_path / "bias_and_mask.npz",
        bias=np.zeros(128_256, np.float32), unseen_mask=np.arange(128_256) >= 36_243,
    )  # fmt: skip
    _, params, seen = load_released(tmp_path, config)
    assert sum(x.size for x in jax.tree.leaves(params["lora"])) == 425_984
    assert seen.sum() == 36_243


def test_what_does_not_fit_is_named(tmp_path):
    good = tmp_path / "good"
    good.mkdir()
    write(good)
    for name in ("adapter_config.json", "adapter_model.safetensors", "bias_and_mask.npz"):
        bad = tmp_path / f"without_{name}"
        shutil.copytree(good, bad)
        (bad / name).unlink()
        with pytest.raises(InputError, match=name):
            load_released(bad, CONFIG)
    with pytest.raises(InputError, match=r"layers\.2\.self_attn\.q_proj\.lora_A\.weight.*missing"):
        load_released(good, DecoderConfig(**{**vars(CONFIG), "num_layers": 3}))
    with pytest.raises(InputError, match=r"layers\.1.*not part of this adapter"):
        load_released(good, DecoderConfig(**{**vars(CONFIG), "num_layers": 1}))
    with pytest.raises(InputError, match="has shape"):
        load_released(good, DecoderConfig(**{**vars(CONFIG), "embed_dim": 8}))
    with pytest.raises(InputError, match="vocabulary of 31"):
        load_released(good, DecoderConfig(**{**vars(CONFIG), "vocab_size": 31}))
    write(good, use_dora=True)
    with pytest.raises(InputError, match="use_dora"):
        load_released(good, CONFIG)
    write(good, target_modules=["lm_head"])
    with pytest.raises(InputError, match="target_modules"):
        load_released(good, CONFIG)
    assert load_file(good / "adapter_model.safetensors")
