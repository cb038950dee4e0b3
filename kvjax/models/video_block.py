"""One layer of a video transformer.

Shapes: x [B, T, S, E] (rows, frames, places, channels), projections [B, T, S, H, D].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.models.decoder import Linear
from kvjax.models.video_attend import FrameAttend, HeldFrames, Projections, inside_frames
from kvjax.models.video_config import VideoDiTConfig
from kvjax.pallas_kernels.frame_attention import place_attention

__all__ = ["Start", "Text", "VideoBlock", "modulate", "zeroed"]

Array = jax.Array
Weight = nnx.Param[Array]


class Text(NamedTuple):
    """What a video is to show, as a text encoder says it.

    Attributes:
        embed: [B, N, text_dim].
        mask: bool[B, N], which tokens are there.
    """

    embed: Array
    mask: Array


def layer_norm(x: Array) -> Array:
    """Without weights, over the last axis, in float32 and back."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return wide.astype(x.dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """The norm of [B, T, S, E], moved by what a frame's timestep says, [B, T or 1, 1, E]."""
    return layer_norm(x) * (1 + scale) + shift


def zeroed(linear: Linear) -> Linear:
    """The layer starts as nothing: a block as the identity."""
    linear.kernel = nnx.Param(jnp.zeros_like(linear.kernel[...]))
    return linear


class SelfAttention(nnx.Module):
    """Projections before and after an attention."""

    def __init__(self, config: VideoDiTConfig, *, zero: bool = False, rngs: nnx.Rngs) -> None:
        e, h, d, dtype = config.embed_dim, config.num_heads, config.head_dim, config.dtype
        self.qkv: Linear = Linear((e,), (3, h, d), True, dtype, rngs=rngs)
        out = Linear((h, d), (e,), True, dtype, rngs=rngs)
        self.out: Linear = zeroed(out) if zero else out

    def project(self, x: Array) -> Projections:
        """Queries, keys and values [B, T, S, H, D] of [B, T, S, E]."""
        qkv = self.qkv(x)
        return qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]

    def queries(self, x: Array) -> Projections:
        """Queries alone, for an attention whose keys and values are all cached."""
        bias = self.qkv.bias
        assert bias is not None
        precision = "highest" if x.dtype == jnp.float32 else None
        q = jnp.einsum("btse,ehd->btshd", x, self.qkv.kernel[...][:, 0], precision=precision)
        q = q + bias[...][0][None, None, None]
        return q, q, q


class TextAttention(nnx.Module):
    """Attention of all tokens to a text."""

    def __init__(self, config: VideoDiTConfig, *, rngs: nnx.Rngs) -> None:
        e, h, d, dtype = config.embed_dim, config.num_heads, config.head_dim, config.dtype
        self.q: Linear = Linear((e,), (h, d), True, dtype, rngs=rngs)
        self.kv: Linear = Linear((e,), (2, h, d), True, dtype, rngs=rngs)
        self.out: Linear = zeroed(Linear((h, d), (e,), True, dtype, rngs=rngs))

    def __call__(self, x: Array, text: Text) -> Array:
        """What [B, T, S, E] takes from a projected text [B, N, E]."""
        q, kv = self.q(x), self.kv(text.embed)
        flat = q.reshape(q.shape[0], -1, *q.shape[3:])
        out = place_attention(flat, kv[:, :, 0], kv[:, :, 1], mask=text.mask)
        return self.out(out.reshape(q.shape))


class Start(nnx.Module):
    """What the first layer's temporal attention gets besides: positions, and who is clean."""

    def __init__(self, config: VideoDiTConfig, *, rngs: nnx.Rngs) -> None:
        e, dtype = config.embed_dim, config.dtype
        merge = Linear((e + 1,), (e,), True, dtype, rngs=rngs)
        merge.kernel = nnx.Param(jnp.eye(e + 1, e, dtype=dtype))  # starts as the identity
        self.merge: Linear | None = merge if config.mask_channel else None

    def __call__(self, x: Array, positions: Array | None, clean: Array) -> Array:
        """Adds positions [B or 1, T, 1, E] and merges in the channel `clean` [B or 1, T, 1, 1]."""
        if positions is not None:
            x = x + positions
        if self.merge is None or self.merge.bias is None:
            return x
        kernel, bias = self.merge.kernel[...], self.merge.bias[...]
        # The last input apart: one channel more would leave the product's sizes odd.
        precision = "highest" if kernel.dtype == jnp.float32 else None
        y = jnp.einsum("btse,ef->btsf", x, kernel[:-1], precision=precision)
        return y + (clean * kernel[-1][None, None, None] + bias[None, None, None])


class VideoBlock(nnx.Module):
    """One layer: in space, to the clean frames, in time, to the text, and an MLP."""

    def __init__(self, config: VideoDiTConfig, *, rngs: nnx.Rngs) -> None:
        e, dtype = config.embed_dim, config.dtype
        self.config = config
        self.spatial: SelfAttention = SelfAttention(config, rngs=rngs)
        code = config.prefix_attention == "code"
        self.prefix: SelfAttention | None = (
            SelfAttention(config, zero=True, rngs=rngs) if code else None
        )
        self.temporal: SelfAttention = SelfAttention(config, zero=True, rngs=rngs)
        self.text: TextAttention | None = (
            TextAttention(config, rngs=rngs) if config.text_dim else None
        )
        self.up: Linear = Linear((e,), (config.mlp_ratio * e,), True, dtype, rngs=rngs)
        self.down: Linear = Linear((config.mlp_ratio * e,), (e,), True, dtype, rngs=rngs)
        table = jax.random.normal(rngs.params(), (6, e), jnp.float32) * e**-0.5
        self.table: Weight = nnx.Param(table.astype(dtype))

    def __call__(
        self,
        x: Array,
        modulation: Array,
        attend: FrameAttend,
        held: HeldFrames | None,
        text: Text | None,
        start: Callable[[Array], Array],
        *,
        ends: bool = False,
    ) -> tuple[Array, Projections, Projections | None]:
        """Runs the layer.

        Args:
            x: [B, T, S, E].
            modulation: [B, T or 1, 6, E], from the timesteps.
            attend: the attentions.
            held: of this layer, or None without a cache.
            text: projected, or None.
            start: what the temporal attention's input goes through.
            ends: stop where nothing more would be written into a cache.

        Returns:
            x, and the projections of the temporal and of the prefix attention.
        """
        rows = modulation + self.table[...][None, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = (rows[:, :, None, i] for i in range(6))
        qkv = self.spatial.project(modulate(x, shift1, scale1))
        prefix = qkv if self.config.prefix_attention == "paper" else None
        out = inside_frames(*qkv) if prefix is None else attend.spatial(qkv, held, True)
        x = x + gate1 * self.spatial.out(out)
        if self.prefix is not None:
            # A noisy frame of this variant sees no key of its own.
            cached = held is not None and not attend.clean
            prefix = self.prefix.queries(x) if cached else self.prefix.project(x)
            x = x + gate1 * self.prefix.out(attend.spatial(prefix, held, False))
        temporal = self.temporal.project(start(x))
        if ends:
            return x, temporal, prefix
        x = x + gate1 * self.temporal.out(attend.temporal(temporal, held))
        if self.text is not None and text is not None:
            x = x + self.text(x, text)
        hidden = jax.nn.gelu(self.up(modulate(x, shift2, scale2)), approximate=True)
        return x + gate2 * self.down(hidden), temporal, prefix
