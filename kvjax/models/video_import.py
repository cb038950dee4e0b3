"""Weights of CausalCache-VDM and Open-Sora 1.0, read into a `VideoDiT`.

Names are those of the released PyTorch models' state dicts. What Open-Sora's video model does not
have (the attention to the prefix and the mask channel) keeps the values that training starts with.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.errors import InputError
from kvjax.models.hf_files import file_tensors
from kvjax.models.video_config import VideoDiTConfig
from kvjax.models.video_dit import VideoDiT
from kvjax.models.weights import parameter_names

__all__ = ["from_state_dict", "load_released", "released_config"]

_NAMES = {
    "patch": "x_embedder.proj",
    "time_up": "t_embedder.mlp.0",
    "time_down": "t_embedder.mlp.2",
    "modulation": "t_block.1",
    "start.merge": "blocks.0.attn_temp_pre_merge",
    "blocks.spatial.qkv": "blocks.{}.attn.qkv",
    "blocks.spatial.out": "blocks.{}.attn.proj",
    "blocks.prefix.qkv": "blocks.{}.attn_cf.qkv",
    "blocks.prefix.out": "blocks.{}.attn_cf.proj",
    "blocks.temporal.qkv": "blocks.{}.attn_temp.qkv",
    "blocks.temporal.out": "blocks.{}.attn_temp.proj",
    "blocks.text.q": "blocks.{}.cross_attn.q_linear",
    "blocks.text.kv": "blocks.{}.cross_attn.kv_linear",
    "blocks.text.out": "blocks.{}.cross_attn.proj",
    "blocks.up": "blocks.{}.mlp.fc1",
    "blocks.down": "blocks.{}.mlp.fc2",
    "blocks.table": "blocks.{}.scale_shift_table",
    "final_table": "final_layer.scale_shift_table",
    "final": "final_layer.linear",
    "text_up": "y_embedder.y_proj.fc1",
    "text_down": "y_embedder.y_proj.fc2",
    "null_text": "y_embedder.y_embedding",
}
_SUFFIX = {"kernel": ".weight", "bias": ".bias"}
_OPTIONAL = ("start.merge", "blocks.prefix")
# Tables that are computed here, and a token that the released model never uses.
_IGNORED = ("pos_embed", "pos_embed_temporal", "bov_token")


def load_released(path: str | Path, *, dtype: str = "float32", **options: Any) -> VideoDiT:
    """A model from a released checkpoint.

    Args:
        path: *.safetensors, or *.pt, *.pth or *.bin, for which PyTorch has to be installed.
        dtype: of the parameters.
        options: fields of `VideoDiTConfig` that weights do not tell, such as height, width, chunk,
            max_prefix, positions and num_heads; by default those of the paper's XL/2.

    Raises:
        InputError: the file cannot be read or is of another model.
    """
    tensors = _read(Path(path))
    config = dataclasses.replace(released_config(tensors, **options), dtype=dtype)
    return from_state_dict(tensors, config)


def released_config(tensors: Mapping[str, np.ndarray], **options: Any) -> VideoDiTConfig:
    """The sizes that a state dict shows, and `options` for those it does not."""
    names = _bare(tensors)
    if "x_embedder.proj.weight" not in names:
        raise InputError(
            "no weights of CausalCache-VDM or Open-Sora 1.0: x_embedder.proj.weight is missing"
        )
    embed_dim, channels, _, patch, _ = names["x_embedder.proj.weight"].shape
    outputs = names["final_layer.linear.weight"].shape[0]
    null = names.get("y_embedder.y_embedding")
    known = {
        "height": 32, "width": 32, "channels": channels, "patch": patch, "embed_dim": embed_dim,
        "num_heads": 16, "num_layers": sum(n.endswith("attn_temp.qkv.bias") for n in names),
        "prefix_attention": "code" if "blocks.0.attn_cf.qkv.weight" in names else "none",
        "mask_channel": "blocks.0.attn_temp_pre_merge.weight" in names,
        "text_dim": 0 if null is None else null.shape[1],
        "text_tokens": 120 if null is None else null.shape[0],
        "learned_variance": outputs == 2 * channels * patch * patch,
    }  # fmt: skip
    return VideoDiTConfig(**(known | options))


def from_state_dict(
    tensors: Mapping[str, np.ndarray], config: VideoDiTConfig, *, seed: int = 0
) -> VideoDiT:
    """A model with the weights of a state dict.

    Args:
        tensors: by their released names, as numpy arrays.
        config: of the model, see `released_config`.
        seed: of what the weights do not have.

    Raises:
        InputError: a weight is missing, of another shape, or unknown.
    """
    left = _bare(tensors)
    graph, params = nnx.split(VideoDiT(config, rngs=nnx.Rngs(seed)))
    leaves, structure = jax.tree.flatten(params)
    found = [
        _convert(name, leaf, left)
        for name, leaf in zip(parameter_names(params), leaves, strict=True)
    ]
    if unknown := sorted(name for name in left if name not in _IGNORED):
        raise InputError(f"the model has no place for {unknown[0]}: its config is another")
    return nnx.merge(graph, jax.tree.unflatten(structure, found))


def _bare(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without what wrappers put before the names."""
    return {name.removeprefix("module."): array for name, array in tensors.items()}


def _convert(name: str, leaf: jax.Array, left: dict[str, np.ndarray]) -> jax.Array:
    """Our parameter from the released ones, which are taken out of `left`."""
    module, _, last = name.rpartition(".")
    known = _NAMES.get(name) or _NAMES[module] + _SUFFIX[last]
    if name.startswith(_OPTIONAL) and known.format(0) not in left:
        return leaf
    stacked = name.startswith("blocks.")
    shape = leaf.shape[1:] if stacked else leaf.shape
    parts = []
    for layer in range(leaf.shape[0] if stacked else 1):
        key = known.format(layer)
        if key not in left:
            raise InputError(f"the weights have no {key}: they are of another model, or incomplete")
        parts.append(_reshape(key, name, left.pop(key), shape))
    whole = np.stack(parts) if stacked else parts[0]
    return jnp.asarray(whole, leaf.dtype)


def _reshape(key: str, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(array, np.float32)
    if array.size != np.prod(shape):
        raise InputError(
            f"{key} is {array.shape}, and the model wants {shape}: its config is another"
        )
    if name == "patch.kernel":  # a convolution [E, C, 1, height, width]
        return array[:, :, 0].transpose(2, 3, 1, 0)
    if name.endswith(".kernel"):  # [outputs, inputs]
        array = array.T
    return array.reshape(shape)


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        found = file_tensors(path, "x_embedder.proj.weight")
        return {n: t.read(tuple(slice(None) for _ in t.shape)) for n, t in found.items()}
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"{path}: reading it needs PyTorch: install it, or convert the file to safetensors"
        ) from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a file that is none may do to it
        raise InputError(f"{path}: cannot be read ({type(e).__name__})") from None
    loaded = loaded.get("ema", loaded.get("model", loaded))
    return {name: tensor.float().numpy() for name, tensor in loaded.items()}
