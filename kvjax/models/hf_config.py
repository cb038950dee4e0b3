"""config.json of a Hugging Face folder, read into a `DecoderConfig` and written from one.

Four architectures are understood, in the fields of transformers 4 (`rope_theta`, `rope_scaling`,
`torch_dtype`) and of transformers 5 (`rope_parameters`, `dtype`, `layer_types`). Where a field is
absent its value is that of the architecture's configuration class in transformers 5.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from kvjax.errors import InputError
from kvjax.models.decoder import DecoderConfig, Rope
from kvjax.models.hf_files import check_folder, read_json

__all__ = ["config_fields", "read_config", "read_dtype"]

_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class _Family:
    """What one architecture fixes, and its values where config.json is silent."""

    model_type: str
    max_positions: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    qwen: bool = False
    sliding_window: int | None = None


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", 2048),
    "MistralForCausalLM": _Family("mistral", 131072, 8, sliding_window=4096),
    "Qwen2ForCausalLM": _Family("qwen2", 32768, 32, qwen=True, sliding_window=4096),
    "Qwen3ForCausalLM": _Family("qwen3", 32768, 32, 128, qwen=True, sliding_window=4096),
}


@dataclasses.dataclass(frozen=True)
class _Fields:
    """A JSON object whose fields are read with their types; null and absent are the same."""

    file: Path
    values: dict[str, Any]
    prefix: str = ""

    def error(self, name: str, problem: str, remedy: str = "mend config.json") -> InputError:
        return InputError(f"{self.file}: {self.prefix + name!r} {problem}; {remedy}")

    def get(self, name: str, default: Any, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self.error(name, f"is missing; it must be {wanted}")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.error(name, f"is {value!r}, not {wanted}")
        return value

    def integer(self, name: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """A whole number from 1 to `most`."""
        value = self.get(name, default, (int,), "a positive integer")
        if not 1 <= value <= most:
            raise self.error(name, f"is {value}, not a positive integer up to {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.get(name, default, (int, float), "a positive number")
        if not (math.isfinite(value) and value > 0):
            raise self.error(name, f"is {value}, not a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        return self.get(name, False, (bool,), "true or false")

    def table(self, name: str) -> "_Fields":
        """An object inside; an absent one is empty."""
        values = self.get(name, {}, (dict,), "a JSON object")
        return _Fields(self.file, values, f"{self.prefix}{name}.")


def read_config(folder: str | Path) -> DecoderConfig:
    """The decoder that a Hugging Face folder describes.

    Args:
        folder: holds config.json.

    Returns:
        The configuration; `dtype` as config.json gives it (float16 becomes bfloat16), float32
        where it is silent.

    Raises:
        InputError: no folder, no or broken config.json, an architecture, rotary kind, activation
            or quantisation that is not supported, a missing or ill-typed field.
    """
    fields = _read_fields(folder)
    architecture, family = _family(fields)
    _refuse_unsupported(fields)
    num_layers = fields.integer("num_hidden_layers", most=10_000)
    embed_dim = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    max_positions = fields.integer("max_position_embeddings", family.max_positions)
    bias = family.model_type in ("llama", "qwen3") and fields.flag("attention_bias")
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        num_layers=num_layers,
        embed_dim=embed_dim,
        mlp_dim=fields.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(fields, family, num_heads),
        head_dim=_head_dim(fields, family, embed_dim, num_heads),
        max_positions=max_positions,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, max_positions),
        windows=_windows(fields, family, num_layers),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        out_bias=bias,
        mlp_bias=family.model_type == "llama" and fields.flag("mlp_bias"),
        qk_norm=family.model_type == "qwen3",
        dtype=_dtype(fields) or "float32",
    )


def read_dtype(folder: str | Path) -> str | None:
    """The dtype that config.json names, as `read_config` understands it, or None."""
    return _dtype(_read_fields(folder))


def _read_fields(folder: str | Path) -> _Fields:
    file = check_folder(folder) / "config.json"
    return _Fields(file, read_json(file))


def _family(fields: _Fields) -> tuple[str, _Family]:
    names = fields.get("architectures", [], (list,), "a list of names")
    by_type = {family.model_type: name for name, family in _FAMILIES.items()}
    name = str(names[0]) if names else by_type.get(str(fields.values.get("model_type")))
    if name not in _FAMILIES:
        found = repr(names[0]) if names else f"model_type {fields.values.get('model_type')!r}"
        raise fields.error(
            "architectures", f"names {found}, which is not supported",
            f"use one of {', '.join(_FAMILIES)}",
        )  # fmt: skip
    return name, _FAMILIES[name]


def _refuse_unsupported(fields: _Fields) -> None:
    """Stops at what would change the result and is not built here."""
    activation = fields.get("hidden_act", "silu", (str,), "a name")
    if activation not in ("silu", "swish"):
        raise fields.error("hidden_act", f"is {activation!r}, not supported", "use 'silu'")
    for name in ("quantization_config", "compression_config"):
        if fields.values.get(name) is not None:
            remedy = "use the unquantised checkpoint"
            raise fields.error(name, "is set: quantised weights are not supported", remedy)
    if fields.values.get("per_layer_config"):
        raise fields.error("per_layer_config", "is not supported", "use a checkpoint without it")


def _num_kv_heads(fields: _Fields, family: _Family, num_heads: int) -> int:
    absent = "num_key_value_heads" not in fields.values and family.num_kv_heads
    default = absent if absent and num_heads % absent == 0 else num_heads
    count = fields.integer("num_key_value_heads", default)
    if num_heads % count:
        problem = f"is {count}, which does not divide num_attention_heads {num_heads}"
        raise fields.error("num_key_value_heads", problem)
    return count


def _head_dim(fields: _Fields, family: _Family, embed_dim: int, num_heads: int) -> int:
    absent = "head_dim" not in fields.values and family.head_dim
    if not absent and fields.values.get("head_dim") is None and embed_dim % num_heads:
        problem = f"is missing, and num_attention_heads {num_heads} does not divide"
        raise fields.error("head_dim", f"{problem} hidden_size {embed_dim}")
    size = fields.integer("head_dim", absent or embed_dim // num_heads)
    if size % 2:
        raise fields.error("head_dim", f"is {size}, but rotary positions need an even one")
    return size


def _rope(fields: _Fields, max_positions: int) -> Rope:
    """Rotary settings: `rope_scaling` first, then `rope_parameters`, as transformers 5 does."""
    table = fields.table("rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters")
    for place in (table, fields):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            remedy = "use a checkpoint that rotates whole heads"
            raise place.error("partial_rotary_factor", "is not 1: not supported", remedy)
    theta = table.number("rope_theta", fields.number("rope_theta", 10_000.0))
    name = "rope_type" if table.values.get("rope_type") is not None else "type"
    kind = table.get(name, "default", (str,), "a name")
    nested = any(isinstance(value, dict) for value in table.values.values())
    if nested or kind not in ("default", "linear", "llama3"):
        problem = "differs by layer" if nested else f"is {kind!r}"
        remedy = "use a checkpoint with default, linear or llama3 positions"
        raise table.error(name, f"{problem}: not supported", remedy)
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=table.number("factor"))
    low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
    if high <= low:
        raise table.error("high_freq_factor", f"is {high}, not above low_freq_factor {low}")
    # As transformers 5: a value beside the table, where a few old files keep it, goes first.
    original = table.integer("original_max_position_embeddings", max_positions)
    original = fields.integer("original_max_position_embeddings", original)
    return Rope(
        theta=theta, kind=kind, factor=table.number("factor"), low_freq_factor=low,
        high_freq_factor=high, original_max_positions=original,
    )  # fmt: skip


def _windows(fields: _Fields, family: _Family, num_layers: int) -> tuple[int, ...]:
    """How far each layer sees; () where all layers see everything."""
    if family.sliding_window is None:
        return ()
    window = _sliding_window(fields, family)
    kinds = fields.get("layer_types", [], (list,), "a list of names")
    if not kinds:
        first = fields.get("max_window_layers", 28, (int,), "an integer") if family.qwen else 0
        windows = tuple(window if i >= first else 0 for i in range(num_layers))
    elif len(kinds) != num_layers:
        problem = f"has {len(kinds)} entries for num_hidden_layers {num_layers}"
        raise fields.error("layer_types", problem)
    else:
        windows = tuple(_layer_window(fields, kind, window) for kind in kinds)
        if not family.qwen and set(windows) != {window}:
            raise fields.error("layer_types", "differs from sliding_window, which a Mistral model "
                               "applies to all layers")  # fmt: skip
    return windows if any(windows) else ()


def _sliding_window(fields: _Fields, family: _Family) -> int:
    """The window of the layers that have one, 0 where none has."""
    if family.qwen and not fields.flag("use_sliding_window"):
        return 0
    if "sliding_window" in fields.values and fields.values["sliding_window"] is None:
        return 0
    return fields.integer("sliding_window", family.sliding_window)


def _layer_window(fields: _Fields, kind: Any, window: int) -> int:
    if kind in ("full_attention", "attention"):
        return 0
    if kind != "sliding_attention":
        raise fields.error("layer_types", f"names {kind!r}, which is not supported",
                           "use full_attention or sliding_attention")  # fmt: skip
    if not window:
        raise fields.error("layer_types", "names sliding_attention, but sliding_window is off")
    return window


def _dtype(fields: _Fields) -> str | None:
    name = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    if fields.values.get(name) is None:
        return None
    dtype = fields.get(name, None, (str,), "a name").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise fields.error(name, f"is {dtype!r}, not supported", f"use one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def config_fields(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a config.json that `read_config` and transformers 4 and 5 read back.

    Raises:
        InputError: no architecture that transformers knows has these switches.
    """
    c = config
    architecture = _architecture(c)
    family = _FAMILIES[architecture]
    fields = {
        "architectures": [architecture],
        "model_type": family.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope.theta,
        "rope_scaling": _rope_scaling(c.rope),
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": c.dtype,
    }
    if family.model_type in ("llama", "qwen3"):
        fields["attention_bias"] = c.out_bias
    if family.model_type == "llama":
        fields["mlp_bias"] = c.mlp_bias
    return fields | _window_fields(c, family)


def _architecture(config: DecoderConfig) -> str:
    """The first architecture that has all of a configuration's switches."""
    c = config
    sliding = set(c.windows) - {0}
    same_bias, qwen_like = c.qkv_bias == c.out_bias, not c.mlp_bias and len(sliding) <= 1
    plain = not (c.qkv_bias or c.out_bias)
    fits = {
        "Qwen3ForCausalLM": c.qk_norm and same_bias and qwen_like,
        "LlamaForCausalLM": not c.qk_norm and same_bias and not sliding,
        "Qwen2ForCausalLM": not c.qk_norm and c.qkv_bias and not c.out_bias and qwen_like,
        "MistralForCausalLM": not c.qk_norm and plain and qwen_like and 0 not in c.windows,
    }
    name = next((name for name, fit in fits.items() if fit), None)
    if name is None:
        raise InputError(
            f"{c.qk_norm=} {c.qkv_bias=} {c.out_bias=} {c.mlp_bias=} windows={sorted(sliding)}: "
            "no Hugging Face architecture has these together; save an Orbax checkpoint instead"
        )
    return name


def _rope_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    table: dict[str, Any] = {"rope_type": rope.kind, "type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        table |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    return table


def _window_fields(config: DecoderConfig, family: _Family) -> dict[str, Any]:
    window = max(config.windows, default=0) or None
    if not family.qwen:
        return {"sliding_window": window} if family.sliding_window else {}
    windows = config.windows or (0,) * config.num_layers
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": next((i for i, w in enumerate(windows) if w), config.num_layers),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }
