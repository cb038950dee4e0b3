"""Weights of Hugging Face folders, read into a `Decoder`'s parameters and written back.

Every parameter is read on its own, and of every tensor only the part that a device keeps, so the
host never holds a second copy of the model. Letters as in `kvjax.models.decoder`.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import save_file

from kvjax import sharding
from kvjax.errors import InputError
from kvjax.models.decoder import Decoder, DecoderConfig
from kvjax.models.hf_config import config_fields, read_config, read_dtype
from kvjax.models.hf_files import INDEX, SINGLE, Tensor, bad_tensor, check_folder, read_tensors

__all__ = ["load", "read_config", "save"]

Bounds = tuple[tuple[int, int], ...]  # (start, stop) along every axis of a block
_DTYPES = ("bfloat16", "float32")
_FLOATS = {"F64": "float32", "F32": "float32", "F16": "bfloat16", "BF16": "bfloat16"}
_SUFFIX = {"kernel": ".weight", "bias": ".bias"}
_REMEDY = "use the config.json that belongs to these weights, or download both again"
_TIED_BLOCK = 1 << 22  # elements compared at a time
_LAYER = "model.layers.{}."
_NAMES = {
    ("embed",): "model.embed_tokens.weight",
    ("norm",): "model.norm.weight",
    ("head", "kernel"): "lm_head.weight",
    ("blocks", "attn_norm"): _LAYER + "input_layernorm.weight",
    ("blocks", "mlp_norm"): _LAYER + "post_attention_layernorm.weight",
    ("blocks", "q_norm"): _LAYER + "self_attn.q_norm.weight",
    ("blocks", "k_norm"): _LAYER + "self_attn.k_norm.weight",
    ("blocks", "q"): _LAYER + "self_attn.q_proj",
    ("blocks", "k"): _LAYER + "self_attn.k_proj",
    ("blocks", "v"): _LAYER + "self_attn.v_proj",
    ("blocks", "out"): _LAYER + "self_attn.o_proj",
    ("blocks", "gate"): _LAYER + "mlp.gate_proj",
    ("blocks", "up"): _LAYER + "mlp.up_proj",
    ("blocks", "down"): _LAYER + "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a parameter of ours lies in a checkpoint's tensors.

    Attributes:
        names: the tensors; one for each layer if the parameter is stacked.
        stacked: whether the parameter has a leading layer axis.
        shape: the parameter's, without that axis.
        groups: for every axis of a tensor, which axes of ours it flattens. A kernel
            [inputs..., outputs...] is stored as [outputs, inputs].
    """

    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.groups)

    @property
    def order(self) -> tuple[int, ...]:
        """Our axes in the order in which the tensor has them."""
        return tuple(axis for group in self.groups for axis in group)

    def read(self, tensor: Tensor, bounds: Bounds) -> np.ndarray:
        """Our block `bounds` of one layer's parameter from its tensor, in our order."""
        sizes = [stop - start for start, stop in bounds]
        rows, shape, keep = [], [], []
        for first, *others in self.groups:
            # Of a flattened group the first axis is cut while reading, the others after it.
            inner = math.prod(self.shape[axis] for axis in others)
            rows.append(slice(bounds[first][0] * inner, bounds[first][1] * inner))
            shape += [sizes[first], *(self.shape[axis] for axis in others)]
            keep += [slice(None), *(slice(*bounds[axis]) for axis in others)]
        block = tensor.read(tuple(rows)).reshape(shape)[tuple(keep)]
        return block.transpose(np.argsort(self.order))

    def write(self, block: np.ndarray) -> np.ndarray:
        """One layer's tensor, contiguous, from our array of it."""
        return np.ascontiguousarray(block.transpose(self.order).reshape(self.tensor_shape))


def _layouts(params: nnx.State, num_layers: int) -> list[_Layout]:
    """Where each leaf of a decoder's parameters (arrays or shapes) is stored."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [_layout(path, leaf.shape, num_layers) for path, leaf in leaves]


def _layout(path: tuple[Any, ...], shape: tuple[int, ...], num_layers: int) -> _Layout:
    keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    stacked = keys[0] == "blocks"
    name = _NAMES.get(keys) or _NAMES[keys[:-1]] + _SUFFIX[keys[-1]]
    names = tuple(name.format(layer) for layer in range(num_layers if stacked else 1))
    shape = shape[1:] if stacked else shape
    axes = tuple(range(len(shape)))
    groups: tuple[tuple[int, ...], ...] = (axes,)
    if keys == ("embed",):
        groups = ((0,), (1,))
    elif keys[-1] == "kernel":
        inputs = 2 if "out" in keys else 1
        groups = (axes[inputs:], axes[:inputs])
    return _Layout(names, stacked, shape, groups)


def load(
    folder: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[Any, nnx.State[Any, Any], DecoderConfig]:
    """Reads a Hugging Face folder.

    Args:
        folder: config.json and either model.safetensors or model.safetensors.index.json with the
            files that it names.
        dtype: "float32" or "bfloat16"; None takes config.json's, else that of the first tensor.
            float16 becomes bfloat16, whose range holds all of float16's; where its three lost
            bits matter, ask for float32.
        mesh: the devices to split the parameters over, by `kvjax.sharding`; None puts them whole
            on the default device.

    Returns:
        `nnx.split` of the decoder, and its configuration: (graphdef, params, config).

    Raises:
        InputError: a config.json, or a tensor or file, that cannot be used; one line names both.
    """
    folder = check_folder(folder)
    config, tensors = read_config(folder), read_tensors(folder)
    dtype = dtype or read_dtype(folder) or _first_dtype(tensors)
    config = dataclasses.replace(config, dtype=_checked_dtype(dtype))
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    leaves, layouts = jax.tree.leaves(shapes), _layouts(shapes, config.num_layers)
    _check(folder, tensors, layouts, config)
    places: list[Any] = [None] * len(leaves)
    if mesh is not None:
        places = jax.tree.leaves(sharding.param_shardings(shapes, mesh))
    arrays = [
        _place(leaf, [tensors[name] for name in layout.names], layout, place)
        for leaf, layout, place in zip(leaves, layouts, places, strict=True)
    ]
    return graphdef, jax.tree.unflatten(jax.tree.structure(shapes), arrays), config


def _checked_dtype(dtype: str) -> str:
    if dtype not in _DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported: use one of {', '.join(_DTYPES)}")
    return dtype


def _first_dtype(tensors: dict[str, Tensor]) -> str:
    return next((_FLOATS[t.dtype] for t in tensors.values() if t.dtype in _FLOATS), "float32")


def _check(
    folder: Path, tensors: dict[str, Tensor], layouts: list[_Layout], config: DecoderConfig
) -> None:
    """Holds every tensor's name, shape and dtype against what config.json asks for."""
    wanted = {name: layout.tensor_shape for layout in layouts for name in layout.names}
    for name, shape in wanted.items():
        if name not in tensors:
            file = folder / (SINGLE if (folder / SINGLE).exists() else INDEX)
            raise bad_tensor(file, name, "is missing, but config.json asks for it", _REMEDY)
        tensor = tensors[name]
        if tensor.shape != shape:
            problem = f"has shape {list(tensor.shape)}, but config.json makes it {list(shape)}"
            raise bad_tensor(tensor.file, name, problem, _REMEDY)
        if tensor.dtype not in _FLOATS:
            problem = f"has dtype {tensor.dtype}, which is not supported"
            raise bad_tensor(tensor.file, name, problem, "use a checkpoint in BF16, F16 or F32")
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    for name in sorted(tensors.keys() - wanted.keys() - tied):
        if not name.endswith("rotary_emb.inv_freq"):  # a buffer that old versions stored
            problem = "is not part of the model that config.json describes"
            raise bad_tensor(tensors[name].file, name, problem, _REMEDY)
    for name in tied & tensors.keys():
        _check_tied(tensors[name], tensors[_NAMES["embed",]])


def _check_tied(head: Tensor, embed: Tensor) -> None:
    """A stored head must be the embedding that config.json ties it to."""
    same = head.shape == embed.shape
    size, width = embed.shape
    step = max(1, _TIED_BLOCK // width)
    for start in range(0, size, step):
        block = (slice(start, min(start + step, size)), slice(0, width))
        same = same and np.array_equal(head.read(block), embed.read(block))
    if not same:
        problem = f"differs from {embed.name!r}, though config.json ties them"
        raise bad_tensor(head.file, head.name, problem, "set tie_word_embeddings to false")


def _place(
    leaf: jax.ShapeDtypeStruct, tensors: list[Tensor], layout: _Layout, place: NamedSharding | None
) -> jax.Array:
    """Reads one parameter, each block once, and puts it on the devices that keep it."""

    def read(bounds: Bounds) -> np.ndarray:
        block = np.empty([stop - start for start, stop in bounds], leaf.dtype)
        if not layout.stacked:
            block[...] = layout.read(tensors[0], bounds)
            return block
        for row, tensor in zip(block, tensors[slice(*bounds[0])], strict=True):
            row[...] = layout.read(tensor, bounds[1:])
        return block

    if place is None:
        return jax.device_put(read(tuple((0, size) for size in leaf.shape)))
    devices: dict[Bounds, list[Any]] = {}
    for device, index in place.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index, leaf.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    # Not `make_array_from_callback`: that reads a block again for each of its copies and holds
    # the blocks of all devices until the last is read.
    blocks: list[jax.Array] = []
    for bounds, copies in devices.items():
        block = read(bounds)
        blocks += jax.block_until_ready([jax.device_put(block, device) for device in copies])
    return jax.make_array_from_single_device_arrays(leaf.shape, place, blocks)


def save(
    folder: str | Path,
    config: DecoderConfig,
    params: nnx.State[Any, Any],
    *,
    dtype: str = "bfloat16",
) -> None:
    """Writes config.json and model.safetensors, which `load` and transformers read.

    Args:
        folder: made where it does not exist; files of these two names are replaced.
        config: the decoder's.
        params: its `nnx.split` state; gathered on the host.
        dtype: "bfloat16" or "float32".

    Raises:
        InputError: no Hugging Face architecture has this configuration's switches.
    """
    fields = config_fields(dataclasses.replace(config, dtype=_checked_dtype(dtype)))
    tensors: dict[str, np.ndarray] = {}
    layouts = _layouts(params, config.num_layers)
    for leaf, layout in zip(jax.tree.leaves(params), layouts, strict=True):
        array = np.asarray(leaf).astype(jnp.dtype(dtype))
        layers = array if layout.stacked else array[None]
        tensors |= dict(zip(layout.names, map(layout.write, layers), strict=True))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Under another name first: an interrupted save must not leave half a file behind.
    part = folder / f"{SINGLE}.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(0o644)  # safetensors makes it readable for its owner only
    part.replace(folder / SINGLE)
    text = json.dumps(fields, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
