"""Between pixels and what a video model sees: nothing, or the autoencoder of Stable Diffusion.

`AutoencoderKL` (Rombach et al. 2022) is read from the folder of a diffusers model. Videos pass it
frame by frame. Attributes have the names of the released weights. Frames are float32[N, H, W, C]
between -1 and 1, latents float32[N, H / f, W / f, D].
"""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.errors import InputError
from kvjax.models.hf_files import Tensor, bad_tensor, check_folder, file_tensors, read_json
from kvjax.models.weights import parameter_names

__all__ = ["Autoencoder", "AutoencoderConfig", "AutoencoderKL", "Pixels", "load_autoencoder"]

Array = jax.Array
_FILE = "diffusion_pytorch_model.safetensors"
# Attention of models from before 2023 has other names.
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


class Autoencoder(Protocol):
    """What training and generation ask of an autoencoder."""

    def encode(self, frames: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the latents, scaled to about unit variance."""
        ...

    def decode(self, latents: Array) -> Array:
        """Frames of scaled latents."""
        ...


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The identity: the model sees pixels."""

    def encode(self, frames: Array) -> tuple[Array, Array]:
        """The frames, and no spread."""
        return frames, jnp.zeros_like(frames)

    def decode(self, latents: Array) -> Array:
        """The latents."""
        return latents


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of an `AutoencoderKL`, by diffusers' names and with its defaults for SD.

    Attributes:
        in_channels, out_channels: of frames.
        latent_channels: of latents.
        block_out_channels: of each resolution; every one after the first halves the sides.
        layers_per_block: residual blocks of a resolution.
        norm_num_groups: of the group norms.
        scaling_factor: what latents are multiplied by.
        shift_factor: what is taken off them before that.
        use_quant_conv, use_post_quant_conv: whether there is a convolution beside the latents.
        mid_block_add_attention: whether the lowest resolution attends.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def factor(self) -> int:
        """Pixels of a side that become one latent."""
        return 2 ** (len(self.block_out_channels) - 1)


def _conv(inputs: int, outputs: int, size: int = 3, *, rngs: nnx.Rngs, **options: Any) -> nnx.Conv:
    options = {"padding": size // 2, "precision": "highest"} | options
    return nnx.Conv(inputs, outputs, (size, size), rngs=rngs, **options)


class _Residual(nnx.Module):
    def __init__(self, inputs: int, outputs: int, groups: int, *, rngs: nnx.Rngs) -> None:
        self.norm1: nnx.GroupNorm = nnx.GroupNorm(inputs, groups, epsilon=1e-6, rngs=rngs)
        self.conv1: nnx.Conv = _conv(inputs, outputs, rngs=rngs)
        self.norm2: nnx.GroupNorm = nnx.GroupNorm(outputs, groups, epsilon=1e-6, rngs=rngs)
        self.conv2: nnx.Conv = _conv(outputs, outputs, rngs=rngs)
        self.conv_shortcut: nnx.Conv | None = (
            _conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None
        )

    def __call__(self, x: Array) -> Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Attention(nnx.Module):
    """One head over all places of a frame."""

    def __init__(self, size: int, groups: int, *, rngs: nnx.Rngs) -> None:
        def linear() -> nnx.Linear:
            return nnx.Linear(size, size, precision="highest", rngs=rngs)

        self.group_norm: nnx.GroupNorm = nnx.GroupNorm(size, groups, epsilon=1e-6, rngs=rngs)
        self.to_q: nnx.Linear = linear()
        self.to_k: nnx.Linear = linear()
        self.to_v: nnx.Linear = linear()
        self.to_out: nnx.List[Any] = nnx.List([linear()])

    def __call__(self, x: Array) -> Array:
        h = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        scores = jnp.einsum("nqd,nkd->nqk", q, k, precision="highest") * q.shape[-1] ** -0.5
        out = jnp.einsum("nqk,nkd->nqd", jax.nn.softmax(scores), v, precision="highest")
        return x + self.to_out[0](out).reshape(x.shape)


class _Middle(nnx.Module):
    def __init__(self, size: int, config: AutoencoderConfig, *, rngs: nnx.Rngs) -> None:
        groups = config.norm_num_groups
        self.resnets: nnx.List[Any] = nnx.List(
            [_Residual(size, size, groups, rngs=rngs) for _ in range(2)]
        )
        attends = config.mid_block_add_attention
        self.attentions: nnx.List[Any] = nnx.List(
            [_Attention(size, groups, rngs=rngs)] if attends else []
        )

    def __call__(self, x: Array) -> Array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class _Resampler(nnx.Module):
    def __init__(self, size: int, *, down: bool, rngs: nnx.Rngs) -> None:
        self.down = down
        options: dict[str, Any] = {"strides": 2, "padding": ((0, 1), (0, 1))} if down else {}
        self.conv: nnx.Conv = _conv(size, size, rngs=rngs, **options)

    def __call__(self, x: Array) -> Array:
        return self.conv(x if self.down else x.repeat(2, axis=1).repeat(2, axis=2))


class _Level(nnx.Module):
    """The residual blocks of one resolution, and the way to the next."""

    def __init__(
        self, inputs: int, outputs: int, count: int, groups: int, resample: str, *, rngs: nnx.Rngs
    ) -> None:
        sizes = [inputs] + [outputs] * (count - 1)
        self.resnets: nnx.List[Any] = nnx.List(
            [_Residual(size, outputs, groups, rngs=rngs) for size in sizes]
        )
        down, up = (
            [_Resampler(outputs, down=kind == "down", rngs=rngs)] if kind == resample else []
            for kind in ("down", "up")
        )
        self.downsamplers: nnx.List[Any] = nnx.List(down)
        self.upsamplers: nnx.List[Any] = nnx.List(up)

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class _Encoder(nnx.Module):
    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs) -> None:
        sizes, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in: nnx.Conv = _conv(config.in_channels, sizes[0], rngs=rngs)
        ways = ["down"] * (len(sizes) - 1) + [""]
        levels = zip(sizes[:1] + sizes, sizes, ways, strict=False)
        self.down_blocks: nnx.List[Any] = nnx.List(
            [_Level(i, o, config.layers_per_block, groups, way, rngs=rngs) for i, o, way in levels]
        )
        self.mid_block: _Middle = _Middle(sizes[-1], config, rngs=rngs)
        norm = nnx.GroupNorm(sizes[-1], groups, epsilon=1e-6, rngs=rngs)
        self.conv_norm_out: nnx.GroupNorm = norm
        self.conv_out: nnx.Conv = _conv(sizes[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nnx.Module):
    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs) -> None:
        sizes, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in: nnx.Conv = _conv(config.latent_channels, sizes[0], rngs=rngs)
        self.mid_block: _Middle = _Middle(sizes[0], config, rngs=rngs)
        ways = ["up"] * (len(sizes) - 1) + [""]
        levels, count = zip(sizes[:1] + sizes, sizes, ways, strict=False), config.layers_per_block
        self.up_blocks: nnx.List[Any] = nnx.List(
            [_Level(i, o, count + 1, groups, way, rngs=rngs) for i, o, way in levels]
        )
        norm = nnx.GroupNorm(sizes[-1], groups, epsilon=1e-6, rngs=rngs)
        self.conv_norm_out: nnx.GroupNorm = norm
        self.conv_out: nnx.Conv = _conv(sizes[-1], config.out_channels, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The autoencoder of Stable Diffusion; all in float32, which its decoder needs."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        size = config.latent_channels
        self.encoder: _Encoder = _Encoder(config, rngs=rngs)
        self.decoder: _Decoder = _Decoder(config, rngs=rngs)
        self.quant_conv: nnx.Conv | None = (
            _conv(2 * size, 2 * size, 1, rngs=rngs) if config.use_quant_conv else None
        )
        self.post_quant_conv: nnx.Conv | None = (
            _conv(size, size, 1, rngs=rngs) if config.use_post_quant_conv else None
        )

    def encode(self, frames: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the scaled latents of frames; see `Autoencoder`."""
        factor = self.config.factor
        if frames.shape[1] % factor or frames.shape[2] % factor:
            raise InputError(
                f"frames of {frames.shape[1]} x {frames.shape[2]} do not fit this autoencoder: "
                f"give sides that are multiples of {factor}"
            )
        moments = self.encoder(frames)
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        scale = self.config.scaling_factor
        spread = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
        return (mean - self.config.shift_factor) * scale, spread * scale

    def decode(self, latents: Array) -> Array:
        """Frames of scaled latents, about -1 to 1."""
        x = latents / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(x if self.post_quant_conv is None else self.post_quant_conv(x))


def load_autoencoder(
    folder: str | Path,
) -> tuple[AutoencoderConfig, nnx.GraphDef[Any], nnx.State[Any, Any]]:
    """An `AutoencoderKL` from a diffusers folder: config.json and the weights as safetensors.

    Returns:
        Its sizes, and the module split into graph and parameters.

    Raises:
        InputError: the folder holds another model, or the weights do not fit the config.
    """
    path = check_folder(folder)
    config = _read_config(path / "config.json")
    shapes = nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(shapes)
    tensors = file_tensors(path / _FILE, "encoder.conv_in.weight")
    leaves, structure = jax.tree.flatten(params)
    names = parameter_names(params)
    read = [_read(path / _FILE, tensors, n, x.shape) for n, x in zip(names, leaves, strict=True)]
    return config, graph, jax.tree.unflatten(structure, read)


def _read_config(path: Path) -> AutoencoderConfig:
    fields = read_json(path)
    if fields.get("_class_name") != "AutoencoderKL":
        raise InputError(f"{path}: is a {fields.get('_class_name')}, not an AutoencoderKL")
    kinds = {*fields.get("down_block_types", ()), *fields.get("up_block_types", ())}
    odd = kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    if odd or fields.get("act_fn", "silu") != "silu" or fields.get("latents_mean"):
        raise InputError(f"{path}: has {sorted(odd) or 'other layers'}, which SD's VAE has not")
    known = {field.name for field in dataclasses.fields(AutoencoderConfig)}
    given = {k: v for k, v in fields.items() if k in known and v is not None}
    given["block_out_channels"] = tuple(given.get("block_out_channels", (64,)))
    return AutoencoderConfig(**{"layers_per_block": 1, **given})


def _read(file: Path, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Array:
    """One parameter: convolutions are [O, I, H, W] there and [H, W, I, O] here."""
    theirs, _, kind = name.rpartition(".")
    theirs = f"{theirs}.{'bias' if kind == 'bias' else 'weight'}"
    if theirs not in tensors:
        for new, old in _OLD_NAMES.items():
            theirs = theirs.replace(f".{new}.", f".{old}.")
    if theirs not in tensors:
        raise bad_tensor(file, theirs, "is missing")
    block = tensors[theirs].read(tuple(slice(None) for _ in tensors[theirs].shape))
    if kind == "kernel":
        # Old attentions keep their matrices as convolutions of one place.
        block = block[:, :, 0, 0] if block.ndim == 4 and len(shape) == 2 else block
        block = block.T if block.ndim == 2 else block.transpose(2, 3, 1, 0)
    if block.shape != shape:
        raise bad_tensor(file, theirs, f"is {tensors[theirs].shape}, which config.json denies")
    return jnp.asarray(np.ascontiguousarray(block, dtype=np.float32))
