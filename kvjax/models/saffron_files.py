"""The adapter that the authors of Saffron-1 released, read into an MRM of this library.

Its folder holds adapter_config.json and adapter_model.safetensors as PEFT writes them, and
bias_and_mask.npz with `bias` float32[V] and `unseen_mask` bool[V] (converted from the release's
two files). Every name and shape is held against the base model's.

The released bias never took part in training: the released code assigns the biased head to PEFT's
wrapper while the forward pass uses the inner model's own, the optimizer's state has no entry for
the bias, and its values cannot be told from PyTorch's first draw, uniform within 1 / sqrt(E). So it
is not applied here unless it is asked for.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.errors import InputError
from kvjax.models.decoder import Decoder, DecoderConfig
from kvjax.models.hf_files import Tensor, bad_tensor, file_tensors, read_json
from kvjax.models.lora import LoRA, factor_shapes

__all__ = ["load_released"]

Array = jax.Array
_NAME = "base_model.model.model.layers.{}.{}_proj.lora_{}.weight"
_PROJECTIONS = {
    "q": "self_attn.q", "k": "self_attn.k", "v": "self_attn.v", "out": "self_attn.o",
    "gate": "mlp.gate", "up": "mlp.up", "down": "mlp.down",
}  # fmt: skip


def load_released(
    folder: Path, config: DecoderConfig, *, inert_bias: bool = False
) -> tuple[LoRA, dict[str, Any], np.ndarray]:
    """Reads the adapter, the bias and the mask.

    Args:
        folder: of the three files.
        config: of the base model, Llama Guard 3 1B for the release.
        inert_bias: whether to take the stored bias as it is, though nothing trained it; else the
            bias is 0, as the released model computes.

    Returns:
        The adapter's settings; {"lora": ..., "head": {"bias": float32[V]}}, to be completed by
        "base"; and bool[V], the tokens that training saw.

    Raises:
        InputError: a file is missing, or does not fit the base model.
    """
    lora = _settings(folder / "adapter_config.json")
    shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[1]
    path = folder / "adapter_model.safetensors"
    tensors = file_tensors(path, _NAME.format(0, "self_attn.q", "A"))
    adapter = {name: _factors(path, tensors, shapes, lora, name) for name in lora.targets}
    if tensors:
        raise bad_tensor(
            path, min(tensors), "is not part of this adapter", "is it another model's?"
        )
    bias, seen = _bias_and_seen(folder / "bias_and_mask.npz", config.vocab_size)
    bias = jnp.asarray(bias if inert_bias else np.zeros_like(bias))
    return lora, {"lora": adapter, "head": {"bias": bias}}, seen


def _settings(path: Path) -> LoRA:
    fields = read_json(path)
    for name in ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out"):
        if fields.get(name):
            raise InputError(f"{path}: {name} is set, which is not supported: use plain LoRA")
    names = {value.split(".")[1] + "_proj": key for key, value in _PROJECTIONS.items()}
    try:
        wanted = {names[name] for name in fields["target_modules"]}
        targets = tuple(name for name in _PROJECTIONS if name in wanted)
        return LoRA(rank=int(fields["r"]), alpha=float(fields["lora_alpha"]), targets=targets)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be used ({error}): it needs r, lora_alpha and target_modules from "
            f"{', '.join(names)}"
        ) from None


def _factors(
    path: Path, tensors: dict[str, Tensor], shapes: Any, lora: LoRA, target: str
) -> dict[str, Array]:
    """Both factors of a target over all layers, in our axes; their tensors are taken out."""
    inputs, outputs = factor_shapes(shapes, target)
    sizes = {"A": (lora.rank, int(np.prod(inputs[1:]))), "B": (int(np.prod(outputs)), lora.rank)}
    found: dict[str, list[np.ndarray]] = {"A": [], "B": []}
    for layer in range(inputs[0]):
        for factor, shape in sizes.items():
            name = _NAME.format(layer, _PROJECTIONS[target], factor)
            tensor = tensors.pop(name, None)
            if tensor is None or tensor.shape != shape:
                what = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
                remedy = "give the base model that the adapter was made for"
                raise bad_tensor(path, name, f"{what}; the model makes it {list(shape)}", remedy)
            block = tensor.read((slice(None), slice(None)))
            found[factor].append(block.astype(np.float32).T)
    return {
        "a": jnp.asarray(np.stack(found["A"]).reshape(*inputs, lora.rank)),
        "b": jnp.asarray(np.stack(found["B"]).reshape(inputs[0], lora.rank, *outputs)),
    }


def _bias_and_seen(path: Path, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path) as file:
            bias, unseen = file["bias"], file["unseen_mask"]
    except (OSError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read ({problem}): give the released files") from None
    if bias.shape != (vocab_size,) or unseen.shape != (vocab_size,) or unseen.dtype != bool:
        raise InputError(
            f"{path}: bias {bias.shape} and mask {unseen.shape} do not fit a vocabulary of "
            f"{vocab_size}: give the base model that the adapter was made for"
        )
    return bias.astype(np.float32), ~unseen
