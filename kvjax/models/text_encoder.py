"""The encoder of T5 (Raffel et al. 2020), version 1.1, that tells video models what to show.

It is read from a Hugging Face folder (config.json, tokenizer.json, *.safetensors of an encoder or
of a whole T5). Layers are stacked and scanned; everything is float32, since T5 overflows shorter
types.

Letters: B texts, N tokens, L layers, E embedding, H heads, D head size, F hidden size of the MLP.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from kvjax.errors import InputError
from kvjax.models.decoder import Linear, rms_norm
from kvjax.models.hf_files import bad_tensor, check_folder, read_json, read_tensors

__all__ = ["T5Config", "T5Encoder", "TextEncoder", "load_text_encoder"]

Array = jax.Array
Weight = nnx.Param[Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Sizes of a `T5Encoder`, by transformers' names.

    Attributes:
        vocab_size, d_model, d_kv, d_ff, num_layers, num_heads: V, E, D, F, L, H.
        relative_attention_num_buckets: distances that are told apart.
        relative_attention_max_distance: farther ones are not.
        layer_norm_epsilon: of the norms.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


def _linear(inputs: tuple[int, ...], outputs: tuple[int, ...], rngs: nnx.Rngs) -> Linear:
    return Linear(inputs, outputs, False, jnp.float32, rngs=rngs)


class _Layer(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        e, heads, f = config.d_model, (config.num_heads, config.d_kv), config.d_ff
        self.eps: float = config.layer_norm_epsilon
        self.attn_norm: Weight = nnx.Param(jnp.ones(e))
        self.q: Linear = _linear((e,), heads, rngs)
        self.k: Linear = _linear((e,), heads, rngs)
        self.v: Linear = _linear((e,), heads, rngs)
        self.out: Linear = _linear(heads, (e,), rngs)
        self.mlp_norm: Weight = nnx.Param(jnp.ones(e))
        self.gate: Linear = _linear((e,), (f,), rngs)
        self.up: Linear = _linear((e,), (f,), rngs)
        self.down: Linear = _linear((f,), (e,), rngs)

    def __call__(self, x: Array, bias: Array) -> Array:
        """Runs on x [B, N, E], with the scores' bias [B, H, N, N]."""
        y = rms_norm(x, self.attn_norm[...], self.eps)
        # T5 does not scale its scores.
        scores = jnp.einsum("bqhd,bkhd->bhqk", self.q(y), self.k(y), precision="highest") + bias
        weights = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, self.v(y), precision="highest")
        x = x + self.out(mixed)
        y = rms_norm(x, self.mlp_norm[...], self.eps)
        return x + self.down(jax.nn.gelu(self.gate(y), approximate=True) * self.up(y))


class T5Encoder(nnx.Module):
    """From int32[B, N] tokens and bool[B, N], which are there, to float32[B, N, E]."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        normal = jax.random.normal
        self.embed: Weight = nnx.Param(normal(rngs.params(), (config.vocab_size, config.d_model)))
        shape = (config.relative_attention_num_buckets, config.num_heads)
        self.distances: Weight = nnx.Param(normal(rngs.params(), shape))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,))
        def stack(rngs: nnx.Rngs) -> _Layer:
            return _Layer(config, rngs=rngs)

        self.layers: _Layer = stack(rngs)
        self.norm: Weight = nnx.Param(jnp.ones(config.d_model))

    def __call__(self, tokens: Array, mask: Array) -> Array:
        """Runs the layers; what stands where no token is means nothing."""
        buckets = _buckets(self.config, tokens.shape[1])
        bias = jnp.transpose(self.distances[...][buckets], (2, 0, 1))[None]
        bias = jnp.where(mask[:, None, None], bias, jnp.finfo(jnp.float32).min)
        graph, layers = nnx.split(self.layers)

        def one(x: Array, params: Any) -> tuple[Array, None]:
            return nnx.merge(graph, params)(x, bias), None

        x, _ = jax.lax.scan(one, self.embed[...][tokens], layers)
        return rms_norm(x, self.norm[...], self.config.layer_norm_epsilon)


def _buckets(config: T5Config, length: int) -> np.ndarray:
    """int[N, N], the bucket of each key's distance from each query.

    Half of the buckets are for keys behind the query; in each half the near distances have one
    each, and farther ones share, by the logarithm.
    """
    half = config.relative_attention_num_buckets // 2
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    near, size = half // 2, np.abs(distance)
    # float32, as the released models round.
    far = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(near))
    far = far / np.log(config.relative_attention_max_distance / near) * (half - near)
    far = np.minimum(near + far.astype(np.int64), half - 1)
    return half * (distance > 0) + np.where(size < near, size, far)


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A T5 encoder with its tokenizer."""

    tokenizer: Tokenizer
    graph: nnx.GraphDef[Any]
    params: nnx.State[Any, Any]

    def __call__(self, texts: list[str], tokens: int = 120) -> tuple[np.ndarray, np.ndarray]:
        """float32[B, tokens, E] and bool[B, tokens], which of them are there; longer ones are cut.

        As the video models were trained, the last token, `</s>`, stays where a text is cut.
        """
        ids, mask = np.zeros((len(texts), tokens), np.int32), np.zeros((len(texts), tokens), bool)
        for row, text in enumerate(texts):
            found = self.tokenizer.encode(text).ids
            found = found if len(found) <= tokens else [*found[: tokens - 1], found[-1]]
            ids[row, : len(found)], mask[row, : len(found)] = found, True
        run = jax.jit(lambda params, ids, mask: nnx.merge(self.graph, params)(ids, mask))
        return np.asarray(run(self.params, ids, mask)), mask


def load_text_encoder(folder: str | Path) -> TextEncoder:
    """A T5 v1.1 encoder from a Hugging Face folder.

    Raises:
        InputError: the folder holds another model, or its files do not fit together.
    """
    path = check_folder(folder)
    fields = read_json(path / "config.json")
    gated = fields.get("feed_forward_proj") == "gated-gelu"
    if fields.get("model_type") != "t5" or not gated:
        raise InputError(f"{path / 'config.json'}: no T5 of version 1.1 (gated-gelu)")
    names = {field.name for field in dataclasses.fields(T5Config)}
    try:
        config = T5Config(**{k: v for k, v in fields.items() if k in names})
    except TypeError as error:
        raise InputError(f"{path / 'config.json'}: lacks a size ({error})") from None
    if not (path / "tokenizer.json").exists():
        raise InputError(f"{path}: has no tokenizer.json; let transformers save the fast one")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    graph, params = _read(path, config)
    return TextEncoder(tokenizer, graph, params)


_NAMES = {
    ("attn_norm",): "0.layer_norm",
    ("q", "kernel"): "0.SelfAttention.q",
    ("k", "kernel"): "0.SelfAttention.k",
    ("v", "kernel"): "0.SelfAttention.v",
    ("out", "kernel"): "0.SelfAttention.o",
    ("mlp_norm",): "1.layer_norm",
    ("gate", "kernel"): "1.DenseReluDense.wi_0",
    ("up", "kernel"): "1.DenseReluDense.wi_1",
    ("down", "kernel"): "1.DenseReluDense.wo",
}
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def _read(path: Path, config: T5Config) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]:
    graph, shapes = nnx.split(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))))
    tensors = read_tensors(path)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise bad_tensor(path / "config.json", name, "is not in the folder")
        found = tensors[name]
        block = found.read(tuple(slice(None) for _ in found.shape))
        if block.size != np.prod(shape, dtype=int):
            raise bad_tensor(found.file, name, f"is {found.shape}, which config.json denies")
        return np.asarray(block, np.float32)

    def leaf(keys: tuple[Any, ...], x: Any) -> Array:
        names = tuple(k.key for k in keys if hasattr(k, "key"))
        if names[0] != "layers":
            theirs = {
                "embed": "shared.weight", "distances": _BIAS,
                "norm": "encoder.final_layer_norm.weight",
            }[names[0]]  # fmt: skip
            embed = "encoder.embed_tokens.weight"  # its name where an encoder was saved alone
            theirs = embed if names[0] == "embed" and theirs not in tensors else theirs
            return jnp.asarray(tensor(theirs, x.shape).reshape(x.shape))
        layers = []
        for i in range(config.num_layers):
            block = tensor(f"encoder.block.{i}.layer.{_NAMES[names[1:]]}.weight", x.shape[1:])
            layers.append((block.T if block.ndim == 2 else block).reshape(x.shape[1:]))
        return jnp.asarray(np.stack(layers))

    return graph, jax.tree_util.tree_map_with_path(leaf, shapes)
