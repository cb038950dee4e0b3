"""What config.json means for every architecture, in old and new fields, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from kvjax.errors import InputError
from kvjax.models import Rope
from kvjax.models.hf_config import read_config

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


def assert_one_line(error: InputError, *words: str) -> None:
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error), str(error)
