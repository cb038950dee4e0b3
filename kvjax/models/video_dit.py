"""The causal video diffusion transformer of Ca2-VDM (Gao et al., ICML 2025): STDiT with a cache.

A frame attends to itself in space, to earlier frames at its own place in time, and in space also to
the last clean frames. Clean frames have timestep 0 wherever they stand before noisy ones, so what
a layer computes for them does not depend on the noise level: it is computed once, kept in a
`FrameRing`, and read by every denoising step.

Shapes: videos [B, T, height, width, C] (rows, frames, latents), timesteps [B] or [B, T] on the
scale that training used, 0..999, outputs like the videos with `out_channels`, float32. Inside: x
[B, T, S, E] with S places a frame.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.cache.frames import FrameRing, NewFrames, append_frames, ranks
from kvjax.errors import InputError
from kvjax.models.decoder import LayerParams, Linear
from kvjax.models.video_attend import CachedFrames, HeldFrames, WholeClip, held_frames
from kvjax.models.video_block import Start, Text, VideoBlock, modulate, zeroed
from kvjax.models.video_config import VIDEO_DIT_SIZES, VideoDiTConfig
from kvjax.models.video_positions import (
    cyclic_rows,
    frame_table,
    place_table,
    timestep_features,
)

__all__ = ["VIDEO_DIT_SIZES", "Text", "VideoDiT", "VideoDiTConfig", "clip_mask"]

Array = jax.Array
Weight = nnx.Param[Array]
_TIME_FEATURES = 256


def clip_mask(config: VideoDiTConfig, frames: int, prefix: Array | int | None = None) -> Array:
    """Which frame of a clip sees which: bool[B or 1, T, T].

    Args:
        config: says by `temporal` whether the past, the chunk or everything is seen.
        frames: T.
        prefix: int32[B] or one int, clean frames at the beginning; "partial" needs it.
    """
    causal = jnp.tril(jnp.ones((1, frames, frames), bool))
    if config.temporal == "full":
        return jnp.ones_like(causal)
    if config.temporal == "causal" or prefix is None:
        return causal
    return causal | ~_clean(frames, prefix)[:, :, None]


def _clean(frames: int, prefix: Array | int) -> Array:
    """Which frames are clean, bool[B or 1, T]."""
    return jnp.arange(frames)[None] < jnp.reshape(prefix, (-1, 1))


def _null_text(config: VideoDiTConfig, rngs: nnx.Rngs) -> Array:
    shape = (config.text_tokens, config.text_dim)
    null = jax.random.normal(rngs.params(), shape, jnp.float32) * config.text_dim**-0.5
    return null.astype(config.dtype)


class VideoDiT(nnx.Module):
    """The video transformer; sizes in `VIDEO_DIT_SIZES`.

    >>> config = dataclasses.replace(VIDEO_DIT_SIZES["tiny"], num_layers=2, height=8, width=8)
    >>> model = VideoDiT(config, rngs=nnx.Rngs(0))
    >>> ring = model.write(jnp.zeros((1, 1, 8, 8, 1)), config.ring(rows=1).init())
    >>> model.denoise(jnp.zeros((1, 8, 8, 8, 1)), jnp.array([999]), ring).shape
    (1, 8, 8, 8, 2)
    """

    def __init__(self, config: VideoDiTConfig, *, rngs: nnx.Rngs) -> None:
        c, e, dtype = config, config.embed_dim, config.dtype
        self.config = config
        patch = (c.patch, c.patch)
        self.patch: Linear = Linear((*patch, c.channels), (e,), True, dtype, rngs=rngs)
        self.time_up: Linear = Linear((_TIME_FEATURES,), (e,), True, dtype, rngs=rngs)
        self.time_down: Linear = Linear((e,), (e,), True, dtype, rngs=rngs)
        self.modulation: Linear = Linear((e,), (6, e), True, dtype, rngs=rngs)
        self.start: Start = Start(config, rngs=rngs)

        @nnx.split_rngs(splits=c.num_layers)
        @nnx.vmap(in_axes=(0,))
        def stack(rngs: nnx.Rngs) -> VideoBlock:
            return VideoBlock(config, rngs=rngs)

        self.blocks: VideoBlock = stack(rngs)
        table = jax.random.normal(rngs.params(), (2, e), jnp.float32) * e**-0.5
        self.final_table: Weight = nnx.Param(table.astype(dtype))
        self.final: Linear = zeroed(Linear((e,), (*patch, c.out_channels), True, dtype, rngs=rngs))
        texts, size = bool(c.text_dim), (c.text_dim,)
        self.text_up: Linear | None = Linear(size, (e,), True, dtype, rngs=rngs) if texts else None
        self.text_down: Linear | None = (
            Linear((e,), (e,), True, dtype, rngs=rngs) if texts else None
        )
        self.null_text: Weight | None = nnx.Param(_null_text(c, rngs)) if texts else None

    def __call__(
        self,
        x: Array,
        t: Array,
        *,
        prefix: Array | int | None = None,
        frames: Array | None = None,
        mask: Array | None = None,
        text: Text | None = None,
        remat: Callable[[Callable], Callable] | None = None,
        layers: LayerParams | None = None,
        return_kv: bool = False,
    ) -> Any:
        """A whole clip at once, clean frames and noisy ones: training, and the way without a cache.

        Args:
            x: [B, T, height, width, C], float.
            t: [B, T], 0 for clean frames; or [B], the same for all frames.
            prefix: int32[B], how many frames at the beginning are clean, or an int for all rows,
                which is less work; None: no frame is.
            frames: int32[T] or [B, T], indices that the cyclic positions follow; None: 0..T-1.
            mask: bool[B or 1, T, T], which frame sees which; None: as `clip_mask` says.
            text: of each row, for a model with text.
            remat: what wraps the function of one layer in training, such as `jax.checkpoint`.
            layers: parameters of each layer from `split_layers`; without them the layers are
                scanned.
            return_kv: return each layer's temporal keys and values too.

        Returns:
            float32[B, T, height, width, out_channels]: the prediction, then the variance. With
            `return_kv` also (k, v), each [L, B, T, S, H, D].
        """
        length = x.shape[1]
        if frames is None:
            frames = jnp.arange(length, dtype=jnp.int32)
        if mask is None:
            mask = clip_mask(self.config, length, prefix)
        kept = 0 if self.config.prefix_attention == "none" else self.config.prefix_frames
        attend = WholeClip(
            prefix=prefix, mask=mask, prefix_frames=kept, rotary=self.config.positions == "rope"
        )
        clean = jnp.zeros((1, length), bool)
        if prefix is not None:
            clean = _clean(length, prefix)
        tokens, time, modulation, text = self._enter(x, t, text)
        start = self._starter(frames, clean, tokens.dtype)
        graph, blocks = nnx.split(self.blocks)

        def run(x: Array, params: Any, first: Callable[[Array], Array]) -> tuple[Array, Any]:
            block = nnx.merge(graph, params)
            x, kv, _ = block(x, modulation, attend, None, text, first)
            return x, kv[1:] if return_kv else None

        def layer_step(x: Array, layer: tuple) -> tuple[Array, Any]:
            number, params = layer
            return run(x, params, lambda x: jax.lax.cond(number == 0, start, lambda x: x, x))

        if layers is None:
            numbers = jnp.arange(self.config.num_layers)
            one_layer = layer_step if remat is None else remat(layer_step)
            tokens, kv = jax.lax.scan(one_layer, tokens, (numbers, blocks))
        else:
            each = []
            once = jax.jit(lambda x, params: run(x, params, lambda x: x))
            for i, params in enumerate(layers):
                tokens, kv = once(tokens, params) if i else run(tokens, params, start)
                each.append(kv)
            kv = jax.tree.map(lambda *x: jnp.stack(x), *each)
        out = self._leave(tokens, time)
        return (out, kv) if return_kv else out

    def denoise(
        self,
        x: Array,
        t: Array,
        ring: FrameRing,
        text: Text | None = None,
        layers: LayerParams | None = None,
        finite: bool = False,
    ) -> Array:
        """One denoising call of the chunk that comes after the cached frames.

        Args:
            x: [B, T, height, width, C], noisy.
            t: [B].
            ring: it is read only.
            text: of each row.
            layers: parameters of each layer from `split_layers`.
            finite: whether slots that are not in use hold finite numbers, as in every ring that
                began empty; it saves a pass over the values.

        Returns:
            float32[B, T, height, width, out_channels].
        """
        out, _ = self._cached(x, t, ring, text, layers, clean=False, finite=finite)
        assert out is not None
        return out

    def write(
        self,
        x: Array,
        ring: FrameRing,
        text: Text | None = None,
        layers: LayerParams | None = None,
    ) -> FrameRing:
        """Puts clean frames into the cache.

        Args:
            x: [B, T, height, width, C], clean. They see all cached frames, then take their places.
            ring: donate it.
            text: of each row.
            layers: parameters of each layer from `split_layers`.
        """
        t = jnp.zeros(x.shape[:1], jnp.int32)
        _, new = self._cached(x, t, ring, text, layers, clean=True)
        return append_frames(ring, new)

    def _cached(
        self, x: Array, t: Array, ring: FrameRing, text: Text | None, layers: LayerParams | None,
        *, clean: bool, finite: bool = False,
    ) -> tuple[Array | None, tuple[NewFrames, ...]]:  # fmt: skip
        """The output of noisy frames, or of clean ones what is to be written."""
        self._check(x, ring, clean)
        config = self.config
        rotary, frames = config.positions == "rope", x.shape[1]
        attend = CachedFrames(
            length=ring.length, ranks=ranks(ring) if rotary else None, clean=clean,
            partial=config.temporal == "partial", finite=finite,
        )  # fmt: skip
        tokens, time, modulation, text = self._enter(x, t, text)
        number = ring.next_frame + jnp.arange(frames, dtype=jnp.int32)
        start = self._starter(number, jnp.full((1, frames), clean), tokens.dtype)
        graph, blocks = nnx.split(self.blocks)

        @jax.jit  # traced once, however many layers there are
        def layer(x: Array, params: Any, held: HeldFrames) -> tuple[Array, NewFrames]:
            return one(x, params, held, lambda x: x, False)

        def one(
            x: Array, params: Any, held: HeldFrames, first: Callable, ends: bool
        ) -> tuple[Array, NewFrames]:
            block = nnx.merge(graph, params)
            x, temporal, prefix = block(x, modulation, attend, held, text, first, ends=ends)
            return x, attend.keep(temporal, prefix)

        new = []
        for i in range(config.num_layers):
            params = jax.tree.map(lambda x: x[i], blocks) if layers is None else layers[i]  # noqa: B023
            held, last = held_frames(ring, i), clean and i == config.num_layers - 1
            if i == 0 or last:
                first = start if i == 0 else (lambda x: x)
                tokens, kept = one(tokens, params, held, first, last)
            else:
                tokens, kept = layer(tokens, params, held)
            new.append(kept)
        return (None if clean else self._leave(tokens, time)), tuple(new)

    def _check(self, x: Array, ring: FrameRing, clean: bool) -> None:
        config = self.config
        if config.temporal == "full":
            raise InputError(
                "a model whose frames see later ones cannot use a cache: use temporal='causal', or "
                "one of the methods that recompute"
            )
        longest = x.shape[1] + (0 if clean else ring.capacity)
        if config.positions == "cyclic" and longest > config.table:
            raise InputError(
                f"{x.shape[1]} new frames and a ring of {ring.capacity} need more positions than "
                f"the {config.table} of the model: make the ring smaller, or give fewer frames"
            )
        if ring.sink_frames != config.sink_frames:
            raise InputError(
                f"the ring keeps {ring.sink_frames} sink frames and the model "
                f"{config.sink_frames}: make the ring with the model's config"
            )

    def _enter(
        self, x: Array, t: Array, text: Text | None
    ) -> tuple[Array, Array, Array, Text | None]:
        """Tokens [B, T, S, E], embedded timesteps [B, T or 1, E], modulation, projected text."""
        c, (b, frames) = self.config, x.shape[:2]
        if x.shape[2:] != (c.height, c.width, c.channels):
            raise InputError(
                f"frames of {x.shape[2:]} (height, width, channels) do not fit a model of "
                f"{(c.height, c.width, c.channels)}: resize them, or use another model"
            )
        dtype = self.final_table[...].dtype
        up, across = c.height // c.patch, c.width // c.patch
        x = x.astype(dtype).reshape(b, frames, up, c.patch, across, c.patch, c.channels)
        x = x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, frames, -1, c.patch, c.patch, c.channels)
        places = jnp.asarray(place_table(up, across, c.embed_dim), dtype)
        tokens = self.patch(x) + places[None, None]
        time = self.time_up(timestep_features(t, _TIME_FEATURES).astype(dtype))
        time = self.time_down(jax.nn.silu(time)).reshape(b, -1, c.embed_dim)
        modulation = self.modulation(jax.nn.silu(time))
        return tokens, time, modulation, self._project_text(text, dtype)

    def _project_text(self, text: Text | None, dtype: Any) -> Text | None:
        if self.text_up is None or self.text_down is None:
            return None
        if text is None:
            raise InputError("this model wants a text: give `text`, or `null_text` for none")
        hidden = jax.nn.gelu(self.text_up(text.embed.astype(dtype)), approximate=True)
        return Text(self.text_down(hidden), text.mask)

    def _starter(self, frames: Array, clean: Array, dtype: Any) -> Callable[[Array], Array]:
        """The first layer's temporal input from x, for frame indices [T] or [B, T]."""
        c, positions = self.config, None
        if c.positions == "cyclic":
            table = jnp.asarray(frame_table(c.table, c.embed_dim), dtype)
            rows = cyclic_rows(frames.reshape(-1, frames.shape[-1]), c.table, c.sink_frames)
            positions = table[rows][:, :, None]
        start, channel = self.start, clean[:, :, None, None].astype(dtype)
        return lambda x: start(x, positions, channel)

    def _leave(self, x: Array, time: Array) -> Array:
        """The output, from tokens and embedded timesteps."""
        c, (b, frames) = self.config, x.shape[:2]
        rows = time[:, :, None] + self.final_table[...][None, None]
        x = self.final(modulate(x, rows[:, :, None, 0], rows[:, :, None, 1]))
        up, across = c.height // c.patch, c.width // c.patch
        x = x.reshape(b, frames, up, across, c.patch, c.patch, c.out_channels)
        x = x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, frames, c.height, c.width, c.out_channels)
        return x.astype(jnp.float32)

    def no_text(self, rows: int) -> Text:
        """The text that stands for none, for so many rows.

        Raises:
            InputError: the model knows no texts.
        """
        if self.null_text is None:
            raise InputError("this model knows no texts")
        null = jax.lax.stop_gradient(self.null_text[...])[None]
        embed = jnp.broadcast_to(null, (rows, *null.shape[1:]))
        return Text(embed, jnp.ones(embed.shape[:2], bool))
