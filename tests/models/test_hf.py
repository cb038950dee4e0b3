"""Hugging Face folders: what config.json means, what is read and written, and what is refused."""

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from kvjax.errors import InputError
from kvjax.models import Decoder, DecoderConfig, Rope
from kvjax.models.hf import _layouts, load, read_config, save
from kvjax.models.hf_files import Tensor, read_tensors
from kvjax.sharding import param_axes

# The published files, cut down to the fields that shape the model.
LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "num_attention_heads": 32, "num_hidden_layers": 2, "num_key_value_heads": 32,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32000,
}  # fmt: skip
LLAMA31_8B = LLAMA2_7B | {
    "attention_bias": False, "mlp_bias": False, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 500000.0,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
LLAMA32_1B = LLAMA31_8B | {
    "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "tie_word_embeddings": True,
    "rope_scaling": LLAMA31_8B["rope_scaling"] | {"factor": 32.0},
}  # fmt: skip
MISTRAL_7B_V1 = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_hidden_layers": 2, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
    "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "max_window_layers": 1, "num_attention_heads": 14, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_06B = QWEN25_05B | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
    "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
    "num_key_value_heads": 8, "max_position_embeddings": 40960, "max_window_layers": 28,
    "rope_scaling": None, "sliding_window": None,
}  # fmt: skip
WINDOWED = QWEN25_05B | {"use_sliding_window": True, "sliding_window": 7}
NEW_STYLE = {key: value for key, value in LLAMA31_8B.items()
             if key not in ("rope_theta", "rope_scaling", "torch_dtype")} | {
    "dtype": "float32",
    "rope_parameters": LLAMA31_8B["rope_scaling"] | {"rope_theta": 500000.0},
}  # fmt: skip
LLAMA31_ROPE = Rope(theta=5e5, kind="llama3", factor=8.0, original_max_positions=8192)


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in names}


def write_config(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (LLAMA2_7B, {"vocab_size": 32000, "num_layers": 2, "embed_dim": 4096, "mlp_dim": 11008,
                     "num_heads": 32, "num_kv_heads": 32, "head_dim": 128, "max_positions": 4096,
                     "norm_eps": 1e-5, "rope": Rope(theta=1e4), "windows": (), "qk_norm": False,
                     "tie_embeddings": False, "qkv_bias": False, "dtype": "bfloat16"}),
        (LLAMA31_8B, {"num_kv_heads": 8, "head_dim": 128, "rope": LLAMA31_ROPE}),
        (NEW_STYLE, {"rope": LLAMA31_ROPE, "dtype": "float32"}),
        (LLAMA32_1B, {"head_dim": 64, "tie_embeddings": True, "num_kv_heads": 8,
                      "rope": dataclasses.replace(LLAMA31_ROPE, factor=32.0)}),
        (LLAMA2_7B | {"attention_bias": True, "mlp_bias": True},
         {"qkv_bias": True, "out_bias": True, "mlp_bias": True}),
        (LLAMA2_7B | {"rope_scaling": {"type": "linear", "factor": 2}},
         {"rope": Rope(theta=1e4, kind="linear", factor=2.0)}),
        (LLAMA2_7B | {"num_key_value_heads": None, "head_dim": None},
         {"num_kv_heads": 32, "head_dim": 128}),
        (without(LLAMA2_7B, "architectures", "torch_dtype", "num_key_value_heads"),
         {"num_kv_heads": 32, "dtype": "float32"}),
        (LLAMA31_8B | {"rope_scaling": without(LLAMA31_8B["rope_scaling"],
                                               "original_max_position_embeddings")},
         {"rope": dataclasses.replace(LLAMA31_ROPE, original_max_positions=131072)}),
        (MISTRAL_7B_V1, {"windows": (4096, 4096), "qkv_bias": False, "head_dim": 128}),
        (MISTRAL_7B_V1 | {"sliding_window": None}, {"windows": ()}),
        (without(MISTRAL_7B_V1, "sliding_window", "num_key_value_heads"),
         {"windows": (4096, 4096), "num_kv_heads": 8}),
        (QWEN25_05B, {"windows": (), "qkv_bias": True, "out_bias": False, "head_dim": 64,
                      "qk_norm": False, "tie_embeddings": True, "mlp_bias": False}),
        (QWEN25_05B | {"attention_bias": False, "mlp_bias": True},
         {"qkv_bias": True, "mlp_bias": False}),
        (WINDOWED, {"windows": (0, 7, 7)}),
        (WINDOWED | {"max_window_layers": 0}, {"windows": (7, 7, 7)}),
        (WINDOWED | {"sliding_window": None}, {"windows": ()}),
        (WINDOWED | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
         {"windows": (7, 0, 0)}),
        (QWEN3_06B, {"qk_norm": True, "head_dim": 128, "qkv_bias": False, "windows": ()}),
        (without(QWEN3_06B, "head_dim") | {"attention_bias": True},
         {"head_dim": 128, "qkv_bias": True, "out_bias": True}),
        (QWEN3_06B | {"head_dim": None}, {"head_dim": 64}),
    ],
)  # fmt: skip
def test_config(fields: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, fields))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ["MixtralForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": None, "model_type": "gemma"}, "gemma"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, "head_dim"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": math.nan}, "rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA31_8B["rope_scaling"] | {"high_freq_factor": 1.0}},
         "high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differs by layer"),
        ({"rope_scaling": [1]}, "rope_scaling"),
    ],
)  # fmt: skip
def test_config_errors(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path, LLAMA2_7B | change)
    with pytest.raises(InputError) as caught:
        read_config(folder)
    assert_one_line(caught.value, str(folder / "config.json"), words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (MISTRAL_7B_V1 | {"sliding_window": 0}, "sliding_window"),
        (MISTRAL_7B_V1 | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (WINDOWED | {"layer_types": ["full_attention"]}, "layer_types"),
        (WINDOWED | {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        (QWEN25_05B | {"layer_types": ["sliding_attention"] * 3}, "sliding_window"),
        (WINDOWED | {"max_window_layers": "all"}, "max_window_layers"),
    ],
)
def test_window_errors(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_config(write_config(tmp_path, fields))
    assert_one_line(caught.value, "config.json", words)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": ', '{"a": 1}}', "\udcff"])
def test_config_that_is_no_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as caught:
        read_config(tmp_path)
    assert_one_line(caught.value, str(tmp_path / "config.json"))


def test_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "absent", tmp_path / "file", tmp_path):
        with pytest.raises(InputError) as caught:
            load(folder)
        assert_one_line(caught.value, str(folder))


def assert_one_line(error: InputError, *words: str) -> None:
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error), str(error)


SMALL = DecoderConfig(
    vocab_size=11, num_layers=3, embed_dim=6, mlp_dim=10, num_heads=4, num_kv_heads=2, head_dim=2,
    max_positions=64, norm_eps=1e-6,
)  # fmt: skip
VARIANTS = {
    "llama": {},
    "llama-biased": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "llama3.1-tied": {"rope": dataclasses.replace(LLAMA31_ROPE, original_max_positions=16),
                      "tie_embeddings": True},
    "mistral": {"windows": (5, 5, 5), "rope": Rope(kind="linear", factor=2.5)},
    "qwen2": {"qkv_bias": True, "windows": (0, 0, 9), "num_kv_heads": 1},
    "qwen3": {"qk_norm": True, "windows": (9, 0, 9), "head_dim": 8},
    "qwen3-biased": {"qk_norm": True, "qkv_bias": True, "out_bias": True, "num_kv_heads": 4},
}  # fmt: skip


def make_params(config: DecoderConfig, seed: int = 0) -> nnx.State:
    """Random parameters, those that begin as zeros and ones too; nothing is compiled."""
    shapes = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_load_returns_what_save_was_given(variant: str, dtype: str, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, dtype=dtype, **VARIANTS[variant])
    params = make_params(config)
    save(tmp_path / "new" / "folder", config, params, dtype=dtype)
    graphdef, loaded, loaded_config = load(tmp_path / "new" / "folder")
    assert loaded_config == config
    model = nnx.merge(graphdef, loaded)
    assert isinstance(model, Decoder) and model.config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True):
        assert theirs.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} == {
        "config.json", "model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_axes(variant: str) -> None:
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    shapes = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        assert len(param_axes(path)) == leaf.ndim, path


@pytest.mark.parametrize(
    "switches",
    [
        {"qk_norm": True, "qkv_bias": True},
        {"out_bias": True},
        {"windows": (4, 0, 4)},
        {"windows": (4, 5, 4), "qkv_bias": True},
        {"windows": (4, 4, 4), "mlp_bias": True},
    ],
)
def test_save_refuses_what_no_architecture_has(switches: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, **switches)
    with pytest.raises(InputError) as caught:
        save(tmp_path, config, make_params(config))
    assert_one_line(caught.value, "no Hugging Face architecture")


def test_layouts_by_hand(tmp_path: Path) -> None:
    """One element of every kind of tensor, found where the Hugging Face layout has it."""
    config = dataclasses.replace(SMALL, qkv_bias=True, qk_norm=True, out_bias=True)
    params = make_params(config)
    save(tmp_path, config, params, dtype="float32")
    files = load_file(tmp_path / "model.safetensors")
    blocks = jax.tree.map(np.asarray, params["blocks"])
    layer, e, h, d, f = 1, 4, 1, 1, 7
    prefix = f"model.layers.{layer}."
    pairs = [
        (files[prefix + "self_attn.q_proj.weight"][h * 2 + d, e],
         blocks["q"]["kernel"][...][layer, e, h, d]),
        (files[prefix + "self_attn.k_proj.bias"][h * 2 + d],
         blocks["k"]["bias"][...][layer, h, d]),
        (files[prefix + "self_attn.o_proj.weight"][e, h * 2 + d],
         blocks["out"]["kernel"][...][layer, h, d, e]),
        (files[prefix + "mlp.down_proj.weight"][e, f], blocks["down"]["kernel"][...][layer, f, e]),
        (files[prefix + "self_attn.q_norm.weight"][d], blocks["q_norm"][...][layer, d]),
        (files["model.embed_tokens.weight"][9, e], params["embed"][...][9, e]),
        (files["lm_head.weight"][9, e], params["head"]["kernel"][...][e, 9]),
    ]  # fmt: skip
    for stored, ours in pairs:
        assert stored == ours


def test_any_block_reads_as_the_slice_of_the_whole(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, qkv_bias=True, out_bias=True)
    params = make_params(config)
    save(tmp_path, config, params, dtype="float32")
    tensors, rng = read_tensors(tmp_path), np.random.default_rng(3)
    leaves = jax.tree.leaves(params)
    for leaf, layout in zip(leaves, _layouts(params, config.num_layers), strict=True):
        whole = np.asarray(leaf)[1] if layout.stacked else np.asarray(leaf)
        tensor = tensors[layout.names[1 if layout.stacked else 0]]
        for _ in range(5):
            starts = [(int(rng.integers(n)), n) for n in whole.shape]
            pairs = [(start, int(rng.integers(start, n)) + 1) for start, n in starts]
            block = layout.read(tensor, tuple(pairs))
            np.testing.assert_array_equal(block, whole[tuple(slice(*pair) for pair in pairs)])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = dataclasses.replace(SMALL, qkv_bias=True)
    save(tmp_path, config, make_params(config), dtype="float32")
    return tmp_path


def rewrite(folder: Path, change: Any) -> None:
    """Lets `change` edit the dict of tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_dtypes(checkpoint: Path) -> None:
    for stored, expected in (
        (np.float16, "bfloat16"), (np.float64, "float32"),
        (ml_dtypes.bfloat16, "bfloat16"), (np.float32, "float32"),
    ):  # fmt: skip
        rewrite(checkpoint, lambda ts, d=stored: ts.update({n: t.astype(d) for n, t in ts.items()}))
        config = json.loads((checkpoint / "config.json").read_text())
        write_config(checkpoint, without(config, "torch_dtype"))
        _, params, ours = load(checkpoint)
        assert ours.dtype == expected
        for dtype in ("float32", "bfloat16"):
            _, params, ours = load(checkpoint, dtype=dtype)
            assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {ours.dtype} == {dtype}
    with pytest.raises(InputError) as caught:
        load(checkpoint, dtype="int8")
    assert_one_line(caught.value, "int8", "bfloat16")


def test_rotary_buffers_and_a_tied_head_are_ignored(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, tie_embeddings=True)
    save(tmp_path, config, make_params(config), dtype="float32")
    _, params, _ = load(tmp_path)

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite(tmp_path, add)
    _, again, _ = load(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"].__setitem__((3, 2), 5.0))
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert_one_line(caught.value, "model.safetensors", "lm_head.weight", "tie_word_embeddings")


K_BIAS, GATE = "model.layers.1.self_attn.k_proj.bias", "model.layers.2.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(K_BIAS), [K_BIAS, "missing"]),
        (lambda t: t.pop("model.embed_tokens.weight"), ["model.embed_tokens.weight", "missing"]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
        (lambda t: t.update({GATE: t[GATE].T.copy()}), [GATE, "[6, 10]", "[10, 6]"]),
        (lambda t: t.update({GATE: t[GATE][:9]}), [GATE, "[9, 6]", "[10, 6]"]),
        (lambda t: t.update({K_BIAS: t[K_BIAS][None]}), [K_BIAS, "[1, 4]", "[4]"]),
        (lambda t: t.update({GATE: t[GATE].astype(np.int8)}), [GATE, "I8"]),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[GATE]}),
         ["model.layers.3.mlp.up_proj.weight", "not part"]),
        (lambda t: t.update({"score.weight": t[GATE]}), ["score.weight", "not part"]),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(change: Any, words: list[str], checkpoint: Path) -> None:
    rewrite(checkpoint, change)
    with pytest.raises(InputError) as caught:
        load(checkpoint)
    assert_one_line(caught.value, str(checkpoint / "model.safetensors"), *words)


def test_truncated_file_names_the_first_tensor_beyond_its_end(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    header.pop("__metadata__")
    by_place = sorted(header, key=lambda name: header[name]["data_offsets"])
    for name in (by_place[0], by_place[5], by_place[-1]):
        begin, end = header[name]["data_offsets"]
        for cut in (begin, (begin + end) // 2, end - 1):
            file.write_bytes(whole[: 8 + length + cut])
            with pytest.raises(InputError) as caught:
                load(checkpoint)
            assert_one_line(caught.value, str(file), repr(name), "truncated")
    for cut in (0, 5, 8, 100):
        file.write_bytes(whole[:cut])
        with pytest.raises(InputError) as caught:
            load(checkpoint)
        assert_one_line(caught.value, str(file), "model.embed_tokens.weight")


def _header(**entry: Any) -> bytes:
    text = json.dumps({"model.norm.weight": entry}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(24)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 988097824\n",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": 1} ',
        struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
        _header(dtype="F32", shape=[6]),
        _header(dtype="F32", shape=[6], data_offsets=[0, 20]),
        _header(dtype="F32", shape=["6"], data_offsets=[0, "x"]),
        _header(dtype="F32", shape=[6], data_offsets=[24, 0]),
        _header(dtype="F32", shape=[-6], data_offsets=[0, -24]),
        _header(dtype="F32", shape=[6], data_offsets=[0]),
    ],
)
def test_file_that_is_no_safetensors(content: bytes, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(checkpoint)
    assert_one_line(caught.value, str(checkpoint / "model.safetensors"), "tensor 'model.")


def test_file_with_bytes_that_belong_to_nothing(checkpoint: Path) -> None:
    """The safetensors library refuses it; our line still names a file and a tensor."""
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes() + bytes(16))
    with pytest.raises(InputError) as caught:
        load(checkpoint)
    assert_one_line(caught.value, str(file), "tensor 'model.")


@pytest.fixture
def sharded(checkpoint: Path) -> Path:
    """The checkpoint in two files with an index."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2],
             "model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, checkpoint / part)
    places = {name: part for part, held in parts.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    return checkpoint


def test_sharded_is_the_same_model(sharded: Path) -> None:
    _, single, _ = load(sharded)
    (sharded / "model.safetensors").unlink()
    _, parts, _ = load(sharded)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), single, parts))


def test_sharded_errors(sharded: Path) -> None:
    (sharded / "model.safetensors").unlink()
    index = sharded / "model.safetensors.index.json"
    first, second = sorted(sharded.glob("model-0*"))
    good = json.loads(index.read_text())

    def message() -> InputError:
        with pytest.raises(InputError) as caught:
            load(sharded)
        return caught.value

    def places(**change: Any) -> None:
        index.write_text(json.dumps({"weight_map": good["weight_map"] | change}))

    places(**{GATE: "../model-00001-of-00002.safetensors"})
    assert_one_line(message(), str(index), GATE, "../model")
    places(**{GATE: 3})
    assert_one_line(message(), str(index), GATE)
    other = {first.name: second.name, second.name: first.name}[good["weight_map"][GATE]]
    places(**{GATE: other})
    assert_one_line(message(), str(sharded / other), GATE, "missing")
    places(**{"model.layers.9.x": second.name})
    assert_one_line(message(), str(second), "model.layers.9.x", "missing")
    index.write_text(json.dumps({"weight_map": []}))
    assert_one_line(message(), str(index), "weight_map")
    index.write_text(json.dumps(good))
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    assert_one_line(message(), str(second), "truncated", "tensor 'model.")
    second.unlink()
    assert_one_line(message(), str(second), "no such file", "tensor 'model.")
    second.write_bytes(whole)
    rest = load_file(second)
    name = next(iter(rest))
    save_file({key: value for key, value in rest.items() if key != name}, second)
    index.write_text(json.dumps({"weight_map": without(good["weight_map"], name)}))
    assert_one_line(message(), str(index), name, "missing")
    index.unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"")
    assert_one_line(message(), str(sharded), "safetensors")


def test_the_host_holds_one_block_at_a_time(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is read twice, and none in a bigger piece than one layer of one parameter."""
    seen: list[tuple[str, int]] = []
    read = Tensor.read

    def spy(tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        block = read(tensor, index)
        seen.append((tensor.name, block.size))
        return block

    monkeypatch.setattr(Tensor, "read", spy)
    load(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    assert sorted(seen) == sorted((name, tensor.size) for name, tensor in tensors.items())
