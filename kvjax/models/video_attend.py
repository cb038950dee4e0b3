"""The attentions of a video model, by what stands before the new frames: a history, or a cache.

A block projects; one of these attends. Shapes inside: x [B, T, S, E] (rows, frames, places,
channels), projections [B, T, S, H, D].
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from kvjax.cache.frames import FrameRing, NewFrames
from kvjax.models.video_positions import rotate_frames
from kvjax.pallas_kernels.frame_attention import frame_attention, place_attention

__all__ = ["CachedFrames", "FrameAttend", "HeldFrames", "WholeClip", "held_frames"]

Array = jax.Array
Projections = tuple[Array, Array, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeldFrames:
    """What the cache holds of one layer; see `FrameRing`."""

    k: Array
    v: Array
    prefix_k: Array | None
    prefix_v: Array | None


def held_frames(ring: FrameRing, layer: int) -> HeldFrames:
    """One layer of a ring."""
    prefix = [planes[layer] if planes else None for planes in (ring.prefix_k, ring.prefix_v)]
    return HeldFrames(ring.k[layer], ring.v[layer], *prefix)


class FrameAttend(Protocol):
    """Where the attentions of a block find their keys.

    Attributes:
        clean: whether all new frames are clean and will be written into the cache.
    """

    @property
    def clean(self) -> bool: ...  # noqa: D102

    def spatial(self, qkv: Projections, held: HeldFrames | None, own: bool) -> Array:
        """Attention inside frames, and of noisy frames to the last clean ones.

        Args:
            qkv: of all new frames.
            held: this layer's cache, or None without one.
            own: whether a noisy frame's own tokens are among its keys ("paper").

        Returns:
            [B, T, S, H, D].
        """
        ...

    def temporal(self, qkv: Projections, held: HeldFrames | None) -> Array:
        """Attention over frames at every place, [B, T, S, H, D]."""
        ...


def inside_frames(q: Array, k: Array, v: Array) -> Array:
    """Every frame by itself: [B, T, S, H, D]."""
    flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return place_attention(*flat).reshape(q.shape)


def to_prefix(qkv: Projections, prefix_k: Array, prefix_v: Array, own: bool) -> Array:
    """Every frame to the P frames before them all, [B, P, S, H, D], and where asked to itself."""
    q, k, v = qkv
    b, t, s, h, d = q.shape
    keys, values = (x.reshape(b, -1, h, d) for x in (prefix_k, prefix_v))
    if not own:  # all frames of a row share their keys: one attention a row
        return place_attention(q.reshape(b, t * s, h, d), keys, values).reshape(q.shape)

    def beside(new: Array, before: Array) -> Array:
        before = jnp.broadcast_to(before[:, None], (b, t, *before.shape[1:]))
        return jnp.concatenate([new, before], axis=2).reshape(b * t, -1, h, d)

    out = place_attention(q.reshape(b * t, s, h, d), beside(k, keys), beside(v, values))
    return out.reshape(q.shape)


def by_place(x: Array) -> Array:
    """[B, T, S, H, D] as [B, S, H, T, D], as the ring has it; its own inverse is `by_frame`."""
    return x.transpose(0, 2, 3, 1, 4)


def by_frame(x: Array) -> Array:
    """[B, S, H, T, D] as [B, T, S, H, D]."""
    return x.transpose(0, 3, 1, 2, 4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeClip:
    """Clean frames and noisy ones in one call, without a cache: training, and the baselines.

    Attributes:
        prefix: int32[B], clean frames at the beginning; an int where all rows have as many, which
            saves the work that only some rows would need; or None: not known, none matter.
        mask: bool[B or 1, T, T], which frame sees which.
        prefix_frames: how many clean frames a noisy one sees in its spatial attention.
        rotary: whether the temporal attention rotates by positions.
        clean: always False: there is no cache to write.
    """

    prefix: Array | int | None
    mask: Array
    prefix_frames: int = dataclasses.field(default=0, metadata={"static": True})
    rotary: bool = dataclasses.field(default=False, metadata={"static": True})
    clean: bool = dataclasses.field(default=False, metadata={"static": True})

    def spatial(self, qkv: Projections, held: HeldFrames | None, own: bool) -> Array:
        """See `FrameAttend`. A clean frame sees itself alone."""
        if self.prefix is None or not self.prefix_frames:
            return inside_frames(*qkv)
        if isinstance(self.prefix, int):
            return self._parted(qkv, self.prefix, own)
        back = jnp.arange(self.prefix_frames, dtype=jnp.int32)[None]
        last = jnp.maximum(self.prefix[:, None] - 1 - back, 0)[:, :, None, None, None]
        k, v = (jnp.take_along_axis(x, last, axis=1) for x in qkv[1:])
        clean = jnp.arange(qkv[0].shape[1])[None] < self.prefix[:, None]
        alone, seeing = inside_frames(*qkv), to_prefix(qkv, k, v, own)
        return jnp.where(clean[:, :, None, None, None], alone, seeing)

    def _parted(self, qkv: Projections, prefix: int, own: bool) -> Array:
        """The clean frames, and the noisy ones behind them, each with their own keys alone."""
        last = [max(prefix - 1 - back, 0) for back in range(self.prefix_frames)]
        k, v = (jnp.stack([x[:, i] for i in last], axis=1) for x in qkv[1:])
        q, own_k, own_v = (x[:, prefix:] for x in qkv)
        clean = inside_frames(*(x[:, :prefix] for x in qkv))
        return jnp.concatenate([clean, to_prefix((q, own_k, own_v), k, v, own)], axis=1)

    def temporal(self, qkv: Projections, held: HeldFrames | None) -> Array:
        """See `FrameAttend`."""
        q, k, v = (by_place(x) for x in qkv)
        if self.rotary:
            positions = jnp.arange(q.shape[3], dtype=jnp.int32)
            q, k = rotate_frames(q, positions), rotate_frames(k, positions)
        return by_frame(frame_attention(q, k, v, mask=self.mask))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedFrames:
    """New frames behind a cache: a noisy chunk that reads it, or a clean one that is to be written.

    Attributes:
        length: int32 scalar, slots of the ring in use.
        ranks: int32[F] of the slots, for rotary positions; or None.
        clean: whether the frames are clean.
        partial: whether noisy frames see all of their chunk.
        finite: whether slots that are not in use hold finite numbers, as in every ring that began
            empty.
    """

    length: Array
    ranks: Array | None = None
    clean: bool = dataclasses.field(default=False, metadata={"static": True})
    partial: bool = dataclasses.field(default=False, metadata={"static": True})
    finite: bool = dataclasses.field(default=False, metadata={"static": True})

    def spatial(self, qkv: Projections, held: HeldFrames | None, own: bool) -> Array:
        """See `FrameAttend`."""
        if self.clean or held is None or held.prefix_k is None or held.prefix_v is None:
            return inside_frames(*qkv)
        return to_prefix(qkv, held.prefix_k, held.prefix_v, own)

    def temporal(self, qkv: Projections, held: HeldFrames | None) -> Array:
        """See `FrameAttend`."""
        assert held is not None
        q, k, v = (by_place(x) for x in qkv)
        t, ring_k = q.shape[3], held.k
        if self.ranks is not None:
            new = self.length + jnp.arange(t, dtype=jnp.int32)
            q, k = rotate_frames(q, new), rotate_frames(k, new)
            ring_k = rotate_frames(ring_k, self.ranks)
        see_all = jnp.ones((1, t, t), bool) if self.partial and not self.clean else None
        out = frame_attention(
            q, k, v, ring_k, held.v, length=self.length, mask=see_all, finite=self.finite
        )
        return by_frame(out)

    def keep(self, temporal: Projections, prefix: Projections | None) -> NewFrames:
        """What a layer writes into the cache; keys before any rotation."""
        k, v = (by_place(x) for x in temporal[1:])
        return NewFrames(k, v, *(prefix[1:] if prefix else ()))
