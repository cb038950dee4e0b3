"""A Llama decoder as programs over shares: one for a layer's prompt, one for a layer's next token.

The owner of the weights prepares them (`prepare`): what it can multiply into them in the clear,
the scales of the norms and of the scores, costs nothing later. Letters as in `kvjax.models.decoder`
and `attention`: T prompt tokens, m of them kept, t places for new ones.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.errors import InputError
from kvjax.infer.private.arithmetic import (
    integer_product,
    keep_top,
    rms_norm,
    rotate,
    silu,
    softmax_parts,
)
from kvjax.infer.private.attention import (
    OURS,
    PUBLISHED,
    Choice,
    attend,
    attend_chosen,
    choose,
    representatives,
)
from kvjax.models.decoder import DecoderConfig

__all__ = [
    "POLICIES", "Policy", "angles", "check_config", "embed", "logits", "next_token", "prepare",
    "read_prompt",
]  # fmt: skip

Array = jax.Array
Layer = Mapping[str, Any]
_HIDDEN = -1e4  # a score that no real one comes near; its exp is cut off


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What a private cache keeps and reads; all of it is public.

    Attributes:
        static: the part of the prompt's tokens that stays; 1 keeps all.
        window: the part of the prompt, at its end, whose queries judge the others.
        choice: how clusters are chosen at each token; None reads all that stayed. Its `clusters` is
            replaced by what `dynamic` comes to.
        dynamic: tokens read, as a part of the prompt's.
        share: every second layer uses the clusters that the layer before it chose (section 3.3).
    """

    static: float = 1.0
    window: float = 0.2
    choice: Choice | None = None
    dynamic: float = 0.05
    share: bool = True

    def kept(self, tokens: int) -> int:
        """How many of a prompt's tokens stay: whole clusters where clusters are chosen."""
        kept = max(1, int(np.ceil(self.static * tokens)))
        size = 1 if self.choice is None else self.choice.size
        if tokens < size:
            return kept
        return min(-(-kept // size), tokens // size) * size

    def chosen(self, tokens: int) -> Choice | None:
        """The choice for a prompt of so many tokens; None where all that stays is read anyway."""
        if self.choice is None:
            return None
        count = round(self.dynamic * tokens / self.choice.size)
        if max(1, count) >= self.kept(tokens) // self.choice.size:
            return None
        return dataclasses.replace(self.choice, clusters=max(1, count))

    def selects(self, layer: int, layers: int) -> bool:
        """Whether a layer chooses for itself: the first two, the last two, and every second."""
        return not self.share or layer < 2 or layer >= layers - 2 or layer % 2 == 0


POLICIES = {
    "full": Policy(),
    "static": Policy(static=0.4),
    "published": Policy(static=0.4, choice=PUBLISHED),
    "ours": Policy(static=0.4, choice=OURS),
}
"""The full cache; look-once eviction alone; MPCache as its paper has it; and as it is cheaper."""


def check_config(config: DecoderConfig, length: int) -> None:
    """Raises InputError for what the private decoder cannot compute."""
    if any(0 < window < length for window in config.windows):
        raise InputError("the model has sliding windows: private inference reads whole caches only")
    if length > config.max_positions:
        raise InputError(f"{length} tokens: the model was made for {config.max_positions}")


def prepare(params: Mapping[str, Any], config: DecoderConfig) -> dict[str, np.ndarray]:
    """Weights as the programs want them, float32, by names such as "0.qkv".

    Args:
        params: of `nnx.split(decoder)`, as a pure dict.
        config: of the model.
    """
    blocks, count, embed = params["blocks"], config.num_layers, config.embed_dim
    scale = config.head_dim**-0.5

    def one(layer: int) -> dict[str, np.ndarray]:
        get = {k: jax.tree.map(lambda x: np.asarray(x[layer], np.float32), v)
               for k, v in blocks.items()}  # fmt: skip
        before, after = get["attn_norm"][:, None], get["mlp_norm"][:, None]
        factors = (1.0 if config.qk_norm else scale, 1.0, 1.0)
        qkv = [get[n]["kernel"].reshape(embed, -1) * f for n, f in zip("qkv", factors, strict=True)]
        made = {
            "qkv": before * np.concatenate(qkv, axis=1),
            "out": get["out"]["kernel"].reshape(-1, embed),
            "gates": after
            * np.concatenate([get[n]["kernel"].reshape(embed, -1) for n in ("gate", "up")], axis=1),
            "down": get["down"]["kernel"].reshape(-1, embed),
        }
        if config.qkv_bias:
            biases = [get[n]["bias"].reshape(-1) * f for n, f in zip("qkv", factors, strict=True)]
            made["qkv_bias"] = np.concatenate(biases)
        if config.out_bias:
            made["out_bias"] = get["out"]["bias"].reshape(-1)
        if config.mlp_bias:
            made["gates_bias"] = np.concatenate([get[n]["bias"] for n in ("gate", "up")], axis=None)
            made["down_bias"] = get["down"]["bias"].reshape(-1)
        if config.qk_norm:
            made["q_norm"], made["k_norm"] = get["q_norm"] * np.float32(scale), get["k_norm"]
        return made

    weights = {f"{i}.{name}": x for i in range(count) for name, x in one(i).items()}
    table = np.asarray(params["embed"], np.float32)
    head = table.T if params.get("head") is None else params["head"]["kernel"]
    norm = np.asarray(params["norm"], np.float32)[:, None]
    return {**weights, "embed": table, "head": norm * np.asarray(head, np.float32)}


def angles(config: DecoderConfig, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Public cosines and sines of positions, float32[T, D/2] each."""
    frequencies = config.rope.inverse_frequencies(config.head_dim)
    angle = positions[:, None].astype(np.float32) * frequencies[None]
    return np.cos(angle), np.sin(angle)


def embed(onehot: Array, table: Array) -> Array:
    """Hidden states [T, E] of secret one-hot tokens int32[T, V]: nobody learns which rows."""
    return integer_product(onehot, table)


def logits(x: Array, head: Array, config: DecoderConfig) -> Array:
    """Scores of the next token [1, V] from the last hidden state [1, E]."""
    return rms_norm(x, jnp.ones((x.shape[-1],), x.dtype), config.norm_eps) @ head


def _biased(x: Array, weights: Layer, name: str) -> Array:
    y = x @ weights[name]
    bias = weights.get(name + "_bias")
    return y if bias is None else y + jnp.broadcast_to(bias[None], y.shape)


def _unit(x: Array, config: DecoderConfig) -> Array:
    """A norm whose scale went into the weights behind it."""
    mean = jnp.sum(x * x, axis=-1, keepdims=True) * (1.0 / x.shape[-1])
    return x * jax.lax.rsqrt(mean + config.norm_eps)


def _project(
    x: Array, weights: Layer, config: DecoderConfig, cos: Array, sin: Array
) -> tuple[Array, Array, Array]:
    """Rotated queries [T, H, D] and keys [T, K, D], and values."""
    h, k, d = config.num_heads, config.num_kv_heads, config.head_dim
    y = _biased(_unit(x, config), weights, "qkv").reshape(x.shape[0], h + 2 * k, d)
    q, key, v = y[:, :h], y[:, h : h + k], y[:, h + k :]
    if config.qk_norm:
        q = rms_norm(q, weights["q_norm"], config.norm_eps)
        key = rms_norm(key, weights["k_norm"], config.norm_eps)
    return rotate(q, cos, sin), rotate(key, cos, sin), v


def _finish(x: Array, attended: Array, weights: Layer, config: DecoderConfig) -> Array:
    """Output product, residual, MLP: hidden states [T, E] from outputs [T, H, D]."""
    x = x + _biased(attended.reshape(x.shape[0], -1), weights, "out")
    gate, up = jnp.split(_biased(_unit(x, config), weights, "gates"), 2, axis=-1)
    return x + _biased(silu(gate) * up, weights, "down")


def _for_all_heads(x: Array, config: DecoderConfig) -> Array:
    """[T, K, D] as [H, T, D]: heads that share keys get copies."""
    return jnp.repeat(x, config.num_heads // config.num_kv_heads, axis=1).transpose(1, 0, 2)


def read_prompt(
    x: Array, weights: Layer, config: DecoderConfig, policy: Policy, cos: Array, sin: Array
) -> tuple[Array, ...]:
    """One layer over the whole prompt.

    Args:
        x: hidden states [T, E].
        weights: of the layer, from `prepare`.
        config: of the model.
        policy: what stays of the cache.
        cos: public, from `angles`.
        sin: likewise.

    Returns:
        Hidden states [T, E]; keys and values that stay, [H, m, D] each; and where clusters are
        chosen their representatives [H, C, D].
    """
    tokens = x.shape[0]
    q, k, v = _project(x, weights, config, cos, sin)
    q = q.transpose(1, 0, 2)
    keys, values = _for_all_heads(k, config), _for_all_heads(v, config)
    window = max(1, int(policy.window * tokens))
    outs, importance = [], jnp.zeros((tokens,), x.dtype)
    for first, last in _blocks(tokens, window):
        out, weights_of, inverse = _causal_block(q, keys, values, first, last)
        outs.append(out)
        if policy.static < 1 and last > tokens - window:
            # One product gives the sum over heads and queries: MPCache's accumulated score.
            rows = inverse.reshape(1, -1) @ weights_of.reshape(-1, last)
            importance = importance + jnp.pad(rows[0], (0, tokens - last))
    out = jnp.concatenate(outs, axis=1).transpose(1, 0, 2)
    x = _finish(x, out, weights, config)
    kept = policy.kept(tokens)
    if kept < tokens:
        both = jnp.concatenate([k, v], axis=1).reshape(tokens, -1)
        if policy.static < 1:
            both = integer_product(keep_top(importance, kept), both)
        both = both[:kept].reshape(kept, 2 * config.num_kv_heads, config.head_dim)
        keys, values = (_for_all_heads(part, config) for part in jnp.split(both, 2, axis=1))
    choice = policy.chosen(tokens)
    if choice is None:
        return x, keys, values
    return x, keys, values, representatives(keys, choice.size, choice.alpha)


def _blocks(tokens: int, window: int, size: int = 64) -> list[tuple[int, int]]:
    """Ranges of queries: later keys than a block's are not computed, and the window is whole."""
    starts = sorted({*range(0, tokens, size), tokens - window})
    return list(zip(starts, [*starts[1:], tokens], strict=True))


def _causal_block(
    q: Array, keys: Array, values: Array, first: int, last: int
) -> tuple[Array, Array, Array]:
    """Queries `first` to `last` over the keys up to `last`: outputs, numerators, reciprocals."""
    scores = jnp.einsum("htd,hnd->htn", q[:, first:last], keys[:, :last])
    seen = np.tri(last - first, last, first, dtype=bool)[None]
    seen = jnp.broadcast_to(jnp.asarray(seen), scores.shape)
    scores = jnp.where(seen, scores, jnp.full_like(scores, _HIDDEN))
    weights, inverse = softmax_parts(scores, seen)
    out = jnp.einsum("htn,hnd->htd", weights, values[:, :last]) * inverse
    return out, weights, inverse


def next_token(
    x: Array, weights: Layer, config: DecoderConfig, choice: Choice | None, cos: Array, sin: Array,
    place: Array, cache: tuple[Array, ...], chosen: Array | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    """One layer at one new token.

    Args:
        x: hidden state [1, E].
        weights: of the layer.
        config: of the model.
        choice: how clusters are read; None reads all.
        cos: public float[1, D/2].
        sin: likewise.
        place: public int32[1], how many tokens were generated before this one.
        cache: keys and values of the prompt, those of new tokens [H, t, D], and, where this layer
            chooses, representatives.
        chosen: of the layer before, where this one shares its choice.

    Returns:
        Hidden state; the new tokens' keys and values with this one's; and the choice, if made here.
    """
    q, k, v = _project(x, weights, config, cos, sin)
    keys, values, new_keys, new_values, *vectors = cache
    places = jnp.arange(new_keys.shape[1], dtype=jnp.int32)
    here = jnp.broadcast_to((places == place)[None, :, None], new_keys.shape)
    new_keys = jnp.where(here, _for_all_heads(k, config), new_keys)
    new_values = jnp.where(here, _for_all_heads(v, config), new_values)
    tail = new_keys, new_values, places <= place
    if choice is None:
        out = attend(q[0], keys, values, tail=tail)
        return _finish(x, out[None], weights, config), new_keys, new_values
    made = chosen is None
    chosen = choose(q[0], vectors[0], choice) if chosen is None else chosen
    out = attend_chosen(q[0], keys, values, chosen, choice, tail)
    result = _finish(x, out[None], weights, config), new_keys, new_values
    return (*result, chosen) if made else result
