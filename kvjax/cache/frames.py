"""The frame ring: keys and values of a video's last frames, written once, read by every step.

A frame is written after it is denoised, with the features it has at timestep 0, and never again.
Frame f lies in slot f while there is room; after that the new frames take the place of the oldest.
Nothing is moved: attention does not care for the order of its keys, and positions are in them (or
are put in at use, see `ranks`). The first `sink_frames` frames can be kept for good.

Letters: L layers, B rows, S places a frame, H heads, D head size, F frames the ring holds, T frames
written at a time, P frames whose keys of the spatial attention are kept too.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvjax.errors import InputError

__all__ = ["FrameRing", "FrameRingConfig", "NewFrames", "append_frames", "frames_held", "ranks"]

Array = jax.Array
Layers = tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameRing:
    """The cache of a video model, a pytree. Layers are apart: each is read where it lies.

    Attributes:
        k, v: L arrays [B, S, H, F, D] of the temporal attention.
        prefix_k, prefix_v: L arrays [B, P, S, H, D] of the attention to the last P frames, oldest
            first; while there are fewer frames, frame 0 stands in for those before it. Empty tuples
            in a model without.
        next_frame: int32 scalar, how many frames were written: the index of the next one.
        sink_frames: how many of the first frames stay.
    """

    k: Layers
    v: Layers
    prefix_k: Layers
    prefix_v: Layers
    next_frame: Array
    sink_frames: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def capacity(self) -> int:
        """F."""
        return self.k[0].shape[3]

    @property
    def length(self) -> Array:
        """Slots in use, int32 scalar: the first ones."""
        return jnp.minimum(self.next_frame, self.capacity)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewFrames:
    """What one layer has to keep of T new frames.

    Attributes:
        k, v: [B, S, H, T, D].
        prefix_k, prefix_v: [B, T, S, H, D], or None.
    """

    k: Array
    v: Array
    prefix_k: Array | None = None
    prefix_v: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameRingConfig:
    """The static sizes of a frame ring.

    Attributes:
        num_layers, rows, num_places, num_heads, head_dim: L, B, S, H, D. With classifier-free
            guidance every video has two rows.
        capacity: F, frames.
        prefix_frames: P, or 0.
        sink_frames: how many of the first frames stay; fewer than F.
        dtype: of keys and values.
    """

    num_layers: int
    rows: int
    num_places: int
    num_heads: int
    head_dim: int
    capacity: int
    prefix_frames: int = 0
    sink_frames: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not 0 <= self.sink_frames < self.capacity:
            raise InputError(
                f"a ring of {self.capacity} frames with {self.sink_frames} sink frames: keep at "
                "least one frame that is no sink"
            )

    def init(self) -> FrameRing:
        """An empty ring."""
        b, s, h, d = self.rows, self.num_places, self.num_heads, self.head_dim
        dtype, layers = jnp.dtype(self.dtype), range(self.num_layers)
        ring, prefix = (b, s, h, self.capacity, d), (b, self.prefix_frames, s, h, d)
        planes: list[Layers] = [tuple(jnp.zeros(ring, dtype) for _ in layers) for _ in "kv"]
        kept = layers if self.prefix_frames else ()
        planes += [tuple(jnp.zeros(prefix, dtype) for _ in kept) for _ in "kv"]
        return FrameRing(
            k=planes[0], v=planes[1], prefix_k=planes[2], prefix_v=planes[3],
            next_frame=jnp.int32(0), sink_frames=self.sink_frames,
        )  # fmt: skip

    def frame_bytes(self, platform: str) -> int:
        """Bytes of one more frame in the ring, as the device lays it out.

        A TPU that keeps the order of the axes fills the last one up to 128 and frames up to 8 or
        16; this is the most. XLA prefers an order without filling where it may choose.
        """
        return self._bytes(self.capacity, platform) // self.capacity

    def nbytes(self, platform: str = "cpu") -> int:
        """Bytes as the device lays them out; on CPU and GPU 2 L B (F + P) S H D itemsize."""
        last = self.num_heads * _tile(self.head_dim, 128, platform)
        prefix = self.rows * self.prefix_frames * self.num_places * last
        itemsize = jnp.dtype(self.dtype).itemsize
        return self._bytes(self.capacity, platform) + 2 * self.num_layers * prefix * itemsize

    def _bytes(self, frames: int, platform: str) -> int:
        itemsize = jnp.dtype(self.dtype).itemsize
        tile = _tile(frames, 32 // itemsize, platform) * _tile(self.head_dim, 128, platform)
        places = self.rows * self.num_places * self.num_heads
        return 2 * self.num_layers * places * tile * itemsize

    def with_memory(self, nbytes: int, platform: str = "cpu") -> "FrameRingConfig":
        """The same ring with the largest capacity that fits into so many bytes.

        Raises:
            InputError: not even one frame fits beside the sinks and the prefix.
        """
        least = dataclasses.replace(self, capacity=self.sink_frames + 1)
        if least.nbytes(platform) > nbytes:
            raise InputError(
                f"a frame ring of {nbytes} bytes holds nothing: give at least "
                f"{least.nbytes(platform)}"
            )
        bare = dataclasses.replace(self, capacity=1)._bytes(1, "cpu")
        low, high = least.capacity, least.capacity + nbytes // bare
        while high > low:  # the largest capacity that fits; sizes grow with it
            middle = (low + high + 1) // 2
            fits = dataclasses.replace(self, capacity=middle).nbytes(platform) <= nbytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return dataclasses.replace(self, capacity=low)


def _tile(size: int, multiple: int, platform: str) -> int:
    return math.ceil(size / multiple) * multiple if platform == "tpu" else size


def frames_held(ring: FrameRing) -> Array:
    """The index of the frame in each slot, int32[F]; -1 for a slot that is not in use."""
    slot = jnp.arange(ring.capacity, dtype=jnp.int32)
    last, turn = ring.next_frame - 1, ring.capacity - ring.sink_frames
    newest = last - (last - slot) % turn  # of the frames whose slot this is
    frame = jnp.where(slot < ring.sink_frames, slot, newest)
    return jnp.where(slot < ring.length, frame, -1)


def ranks(ring: FrameRing) -> Array:
    """The place of each slot's frame among those held, oldest first, int32[F].

    New frames come after these, from `ring.length` on. Rotary positions follow ranks, so that they
    stay in the range of training however long a video grows.
    """
    slot = jnp.arange(ring.capacity, dtype=jnp.int32)
    oldest = ring.next_frame - ring.length  # of those that are no sinks: plus sink_frames
    return jnp.where(slot < ring.sink_frames, slot, frames_held(ring) - oldest)


def append_frames(ring: FrameRing, new: tuple[NewFrames, ...]) -> FrameRing:
    """Writes T frames behind those held; the oldest that are no sinks give way.

    Args:
        ring: donate it, and it is written where it lies.
        new: of each layer. Of more frames than the ring turns over, the last are kept.
    """
    frames = new[0].k.shape[3]
    frame = ring.next_frame + jnp.arange(frames, dtype=jnp.int32)
    turn = ring.capacity - ring.sink_frames
    slot = jnp.where(
        frame < ring.sink_frames, frame, ring.sink_frames + (frame - ring.sink_frames) % turn
    )
    # Two frames of one write must not meet in a slot: there the later one counts.
    stays = (frame < ring.sink_frames) | (frame >= ring.next_frame + frames - turn)
    slot = jnp.where(stays, slot, ring.capacity)

    def write(plane: Array, chunk: Array) -> Array:
        return plane.at[:, :, :, slot].set(chunk.astype(plane.dtype), mode="drop")

    def shift(plane: Array, chunk: Array | None) -> Array:
        assert chunk is not None
        first = jnp.broadcast_to(chunk[:, :1], plane.shape).astype(plane.dtype)
        before = jnp.where(ring.next_frame == 0, first, plane)
        return jnp.concatenate([before, chunk.astype(plane.dtype)], axis=1)[:, frames:]

    def each(f: Callable[..., Array], planes: Layers, name: str) -> Layers:
        return tuple(f(plane, getattr(new[i], name)) for i, plane in enumerate(planes))

    return dataclasses.replace(
        ring,
        k=each(write, ring.k, "k"),
        v=each(write, ring.v, "v"),
        prefix_k=each(shift, ring.prefix_k, "prefix_k"),
        prefix_v=each(shift, ring.prefix_v, "prefix_v"),
        next_frame=ring.next_frame + frames,
    )
