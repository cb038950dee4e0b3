"""The Llama-family decoder: one model, stacked layers, and an `attend` that the caller brings.

The model never knows where its keys and values live. Every layer hands its queries, keys and
values to `attend(layer, q, k, v, state) -> (out, state)`, and `state` (a page pool, or nothing)
travels through the layer scan as its carry. Prefill, decoding, training and scoring are different
`attend`s, not different models.

Letters: L layers, V vocabulary, E embedding, F hidden size of the MLP, H query heads, K KV heads,
D head size. `...` is any leading shape: [T] ragged tokens in the engine, [B, T] in training.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.pallas_kernels.few_rows import gated_product, product

__all__ = [
    "Attend", "Decoder", "DecoderConfig", "JoinedBlock", "LayerParams", "Rope", "join_products",
    "split_layers",
]  # fmt: skip

Array = jax.Array
Weight = nnx.Param[Array]


class Attend(Protocol):
    """Where attention happens: the only thing that a decoder asks of its caller."""

    def __call__(
        self, layer: Array, q: Array, k: Array, v: Array, state: Any, /
    ) -> tuple[Array, Any]:
        """Attends with one layer's projections.

        Args:
            layer: int32 scalar (traced by the layer scan), 0 for the first layer.
            q: [..., H, D], rotated.
            k: [..., K, D], rotated.
            v: [..., K, D].
            state: an opaque pytree of fixed structure.

        Returns:
            The heads' outputs [..., H, D] in q's dtype, and the state.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: base and, for models stretched past their training length, the scaling.

    `kind` is "default", "linear" (frequencies divided by `factor`; Chen et al. 2023) or "llama3"
    (Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each rotated pair, float32[D/2]."""
        # Rounded where the checkpoints' own code rounds: far positions magnify the last bit.
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        freq = np.float32(1) / (self.theta ** exponent.astype(np.float64)).astype(np.float32)
        if self.kind == "linear":
            freq = freq / self.factor
        elif self.kind == "llama3":
            wavelength = 2 * math.pi * (np.float32(1) / freq)
            turns = self.original_max_positions * (np.float32(1) / wavelength)
            ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = np.clip(ramp, 0.0, 1.0)
            freq = (1 - keep) * freq / self.factor + keep * freq
        return freq.astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of one decoder.

    `windows` holds for each layer how many of the last positions it sees, itself included; 0 is
    all of them. `max_positions` is the longest sequence that the weights were made for.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    rope: Rope = Rope()
    windows: tuple[int, ...] = ()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads=} is no multiple of {self.num_kv_heads=}")
        if len(self.windows) not in (0, self.num_layers):
            raise ValueError(f"{self.windows=} names {len(self.windows)} of {self.num_layers=}")

    def layer_windows(self) -> Array | None:
        """The windows as int32[L] for `attend`, or None where every layer sees everything."""
        return jnp.asarray(self.windows, jnp.int32) if any(self.windows) else None


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis, computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def rotate(x: Array, positions: Array, inverse_frequencies: np.ndarray) -> Array:
    """Rotary embedding (Su et al. 2021) in the half-split layout of the Llama checkpoints.

    Args:
        x: [..., heads, D].
        positions: int32[...].
        inverse_frequencies: float32[D/2], radians per position.
    """
    freq = jnp.asarray(inverse_frequencies).reshape((1,) * positions.ndim + (1, -1))
    angle = positions.astype(jnp.float32)[..., None, None] * freq
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


class Linear(nnx.Module):
    """A product over the leading axes of `kernel`, with an optional bias over the others.

    `streams` says that few rows may go through `few_rows`, whose kernel no mesh can split.
    """

    def __init__(
        self, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool, dtype: Any,
        *, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.axes: int = len(inputs)
        self.streams: bool = False
        std = math.prod(inputs) ** -0.5
        kernel = std * jax.random.normal(rngs.params(), inputs + outputs, jnp.float32)
        self.kernel: Weight = nnx.Param(kernel.astype(dtype))
        self.bias: Weight | None = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...]
        # float32 means float32, on accelerators too, where the default is a shorter product.
        precision = "highest" if kernel.dtype == jnp.float32 else None
        if self.streams:
            rows, outputs = x.shape[: x.ndim - self.axes], kernel.shape[self.axes :]
            matrix = kernel.reshape(math.prod(kernel.shape[: self.axes]), -1)
            y = product(x.reshape(*rows, -1), matrix).reshape(*rows, *outputs)
        else:
            y = jnp.tensordot(x, kernel, self.axes, precision=precision)
        if self.bias is None:
            return y
        bias = self.bias[...]
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


class Block(nnx.Module):
    """One layer: attention and a gated MLP, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        c, dtype = config, jnp.dtype(config.dtype)
        self.config = config
        e, h, kv, d, f = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim
        self.attn_norm: Weight = nnx.Param(jnp.ones((e,), dtype))
        self.q: Linear = Linear((e,), (h, d), c.qkv_bias, dtype, rngs=rngs)
        self.k: Linear = Linear((e,), (kv, d), c.qkv_bias, dtype, rngs=rngs)
        self.v: Linear = Linear((e,), (kv, d), c.qkv_bias, dtype, rngs=rngs)
        self.out: Linear = Linear((h, d), (e,), c.out_bias, dtype, rngs=rngs)
        self.q_norm: Weight | None = nnx.Param(jnp.ones((d,), dtype)) if c.qk_norm else None
        self.k_norm: Weight | None = nnx.Param(jnp.ones((d,), dtype)) if c.qk_norm else None
        self.mlp_norm: Weight = nnx.Param(jnp.ones((e,), dtype))
        self.gate: Linear = Linear((e,), (f,), c.mlp_bias, dtype, rngs=rngs)
        self.up: Linear = Linear((e,), (f,), c.mlp_bias, dtype, rngs=rngs)
        self.down: Linear = Linear((f,), (e,), c.mlp_bias, dtype, rngs=rngs)

    def __call__(
        self, layer: Array, x: Array, positions: Array, state: Any, attend: Attend
    ) -> tuple[Array, Any]:
        eps = self.config.norm_eps
        freq = self.config.rope.inverse_frequencies(self.config.head_dim)
        q, k, v = self._heads(rms_norm(x, self.attn_norm[...], eps))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm[...], eps), rms_norm(k, self.k_norm[...], eps)
        q, k = rotate(q, positions, freq), rotate(k, positions, freq)
        out, state = attend(layer, q, k, v, state)
        x = x + self.out(out)
        return x + self.down(self._gated(rms_norm(x, self.mlp_norm[...], eps))), state

    def _heads(self, y: Array) -> tuple[Array, Array, Array]:
        """Queries [..., H, D], keys and values [..., K, D] of normed states."""
        return self.q(y), self.k(y), self.v(y)

    def _gated(self, y: Array) -> Array:
        """The MLP's first half, [..., F], of normed states."""
        return jax.nn.silu(self.gate(y)) * self.up(y)


class JoinedBlock(Block):
    """A layer whose products with the same left side are one: what `join_products` is for.

    Few rows leave most of an accelerator idle in a narrow product; one that is as wide as several
    reads its weights at nearly the memory's rate.
    """

    def __init__(self, config: DecoderConfig, *, streams: bool, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        c, dtype = config, jnp.dtype(config.dtype)
        group = c.num_heads // c.num_kv_heads + 2
        # By KV head, with its queries' heads: a mesh can split the product as it splits the heads.
        heads = (c.num_kv_heads, group, c.head_dim)
        self.qkv: Linear = Linear((c.embed_dim,), heads, c.qkv_bias, dtype, rngs=rngs)
        self.gate_up: Linear = Linear((c.embed_dim,), (2, c.mlp_dim), c.mlp_bias, dtype, rngs=rngs)
        del self.q, self.k, self.v, self.gate, self.up
        for linear in (self.qkv, self.out, self.gate_up, self.down):
            linear.streams = streams

    def _heads(self, y: Array) -> tuple[Array, Array, Array]:
        x = self.qkv(y)
        q = x[..., :-2, :].reshape(*x.shape[:-3], self.config.num_heads, self.config.head_dim)
        return q, x[..., -2, :], x[..., -1, :]

    def _gated(self, y: Array) -> Array:
        if self.gate_up.streams and self.gate_up.bias is None:
            return gated_product(y, self.gate_up.kernel[...])
        x = self.gate_up(y)
        return jax.nn.silu(x[..., 0, :]) * x[..., 1, :]


class Decoder(nnx.Module):
    """A Llama, Qwen or Mistral decoder with stacked layers.

    >>> config = DecoderConfig(vocab_size=8, num_layers=2, embed_dim=4, mlp_dim=8, num_heads=2,
    ...                        num_kv_heads=1, head_dim=2, max_positions=16)
    >>> graph, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    >>> params["blocks"]["q"]["kernel"].shape  # [L, E, H, D]
    (2, 4, 2, 2)
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.dtype)
        self.config = config
        shape = (config.vocab_size, config.embed_dim)
        embed = config.embed_dim**-0.5 * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embed: Weight = nnx.Param(embed.astype(dtype))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,))
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks: Block = stack(rngs)
        self.norm: Weight = nnx.Param(jnp.ones((config.embed_dim,), dtype))
        head = (config.embed_dim,), (config.vocab_size,)
        untied = not config.tie_embeddings
        self.head: Linear | None = (
            Linear(*head, bias=False, dtype=dtype, rngs=rngs) if untied else None
        )

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        state: Any,
        attend: Attend,
        *,
        remat: Callable[[Callable], Callable] | None = None,
        unroll: int | bool = 1,
        layers: "LayerParams | None" = None,
    ) -> tuple[Array, Any]:
        """Runs the layers, in the dtype of their norms.

        Args:
            tokens: int32[...] token ids.
            positions: int32[...] true positions, which the rotary angles follow.
            state: what `attend` carries from layer to layer.
            attend: the attention, see `Attend`.
            remat: what wraps the function of one layer in training, such as `jax.checkpoint`.
            unroll: as in `jax.lax.scan`: how many layers the compiler sees at a time; True is all.
            layers: the layers' parameters from `split_layers`, to be used instead of the stacked
                ones, one layer after the other.

        Returns:
            The normed hidden states [..., E], ready for `logits`, and the state.
        """
        graph, blocks = nnx.split(self.blocks)

        def layer_step(carry: tuple, layer_params: tuple) -> tuple[tuple, None]:
            x, state = carry
            layer, params = layer_params
            return nnx.merge(graph, params)(layer, x, positions, state, attend), None

        # In mixed-precision training the table alone stays float32, for the sums of its gradient.
        x = self.embed[...][tokens].astype(self.norm[...].dtype)
        number = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        one_layer = layer_step if remat is None else remat(layer_step)
        if layers is None:
            (x, state), _ = jax.lax.scan(one_layer, (x, state), (number, blocks), unroll=unroll)
        else:
            once = jax.jit(one_layer)  # traced once, however many layers there are
            for i, params in enumerate(layers):
                (x, state), _ = once((x, state), (number[i], params))
        return rms_norm(x, self.norm[...], self.config.norm_eps), state

    def logits(self, hidden: Array) -> Array:
        """Scores of the next token, float32[..., V], from hidden states [..., E]."""
        # Summed and kept in float32: near-equal logits must not become equal.
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        if hidden.dtype == jnp.float32:
            product = functools.partial(product, precision="highest")
        if self.head is not None:
            return product("...e,ev->...v", hidden, self.head.kernel[...].astype(hidden.dtype))
        return product("...e,ve->...v", hidden, self.embed[...].astype(hidden.dtype))


LayerParams = tuple[nnx.State[Any, Any], ...]
"""The parameters of each layer by itself."""


def split_layers(
    params: nnx.State[Any, Any], *, consume: bool = False
) -> tuple[nnx.State[Any, Any], LayerParams]:
    """Takes the stacked layers of a decoder's parameters apart.

    A scan copies every layer's slice of the stacked parameters before it uses them. Where weights
    are read for few tokens, as in decoding, that more than doubles the time.

    Args:
        params: of `nnx.split(decoder)`.
        consume: delete each stacked array as soon as it is taken apart, so that memory holds the
            parameters once; `params` is of no use afterwards.

    Returns:
        Parameters to merge the decoder with, of which only the first layer's are there, and all
        layers' parameters for its call.
    """
    leaves, structure = jax.tree.flatten(params["blocks"])
    apart = []
    for leaf in leaves:
        apart.append([leaf[i] for i in range(leaf.shape[0])])
        if consume:
            leaf.delete()
    layers = tuple(jax.tree.unflatten(structure, layer) for layer in zip(*apart, strict=True))
    first = jax.tree.map(lambda x: x, params)
    first["blocks"] = layers[0]
    return first, layers


def join_products(
    graph: nnx.GraphDef[Any],
    params: nnx.State[Any, Any],
    layers: LayerParams,
    *,
    streams: bool = False,
) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any], LayerParams]:
    """A decoder with one product for queries, keys and values and one for the MLP's two inputs.

    Args:
        graph: of `nnx.split(decoder)`.
        params: from `split_layers`.
        layers: likewise; what is joined of them is deleted.
        streams: whether products of few rows may use the kernel of `few_rows`, where there is one:
            not where the parameters are split over a mesh.

    Returns:
        The same three of a decoder of `JoinedBlock`s.
    """
    decoder = nnx.merge(graph, params)
    abstract = nnx.eval_shape(
        lambda: JoinedBlock(decoder.config, streams=streams, rngs=nnx.Rngs(0))
    )
    block, shapes = nnx.split(abstract)
    joined = tuple(_join(decoder.config, shapes, layer) for layer in layers)
    decoder.blocks = nnx.merge(block, joined[0])
    return *nnx.split(decoder), joined


def _join(
    config: DecoderConfig, shapes: nnx.State[Any, Any], layer: nnx.State[Any, Any]
) -> nnx.State[Any, Any]:
    """A layer's parameters in the structure of `shapes`."""
    old = nnx.to_pure_dict(layer)
    groups = config.num_kv_heads, -1, config.head_dim

    def heads(part: str) -> Array:
        parts = [old[name][part] for name in "qkv"]
        return _joined(parts, [x.reshape(*x.shape[:-2], *groups) for x in parts])

    def gates(part: str) -> Array:
        parts = [old[name][part] for name in ("gate", "up")]
        return _joined(parts, [x[..., None, :] for x in parts])

    new = {name: x for name, x in old.items() if name not in ("q", "k", "v", "gate", "up")}
    new["qkv"] = {part: heads(part) for part in old["q"]}
    new["gate_up"] = {part: gates(part) for part in old["gate"]}
    state = jax.tree.map(lambda x: x, shapes)
    nnx.replace_by_pure_dict(state, new)
    return state


def _joined(parts: list[Array], shaped: list[Array]) -> Array:
    joined = jnp.concatenate(shaped, axis=-2).block_until_ready()
    for part in parts:  # memory holds the parameters once
        part.delete()
    return joined
