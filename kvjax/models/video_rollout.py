"""Videos chunk by chunk: pure functions from a state to the next state and a chunk of frames.

The state is all there is: whoever keeps it can stop and go on, bit for bit. Every method has the
same loop around it, so that they can be compared:

    ca2     the cache of Ca2-VDM: clean frames are computed once, noisy ones read them
    os-ext  the last max_prefix frames are computed again in every denoising call (OS-Ext)
    os-fix  the last chunk is computed again in every denoising call (OS-Fix)
    joint   the whole history is computed again, and frames see what a cache would have shown them:
            what ca2 must equal, at a cost that grows with the video
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.cache.frames import FrameRing
from kvjax.diffusion.sampler import Sampler, guided, row_noise, sample
from kvjax.diffusion.schedule import add_noise, linear_schedule
from kvjax.errors import InputError
from kvjax.models.decoder import LayerParams, split_layers
from kvjax.models.video_config import VideoDiTConfig
from kvjax.models.video_dit import Text, VideoDiT

__all__ = [
    "METHODS", "Rollout", "RolloutState", "SplitVideoModel", "history_mask", "next_chunk",
    "rollout", "split_video_model", "start",
]  # fmt: skip

Array = jax.Array
METHODS = ("ca2", "os-ext", "os-fix", "joint")
# Numbers of a row's noise; smaller ones are steps of the sampler.
_START, _PREFIX = 1 << 20, (1 << 20) + 1
_DDPM = Sampler()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """How a video is made.

    Attributes:
        method: one of `METHODS`.
        sampler: how chunks are denoised. With guidance other than 1 every video has two rows, one
            without text.
        prefix_step: a light noise level for clean frames before the network sees them, as in
            training; None: none.
        dtype: of the cache; None: the model's.
    """

    method: str = "ca2"
    sampler: Sampler = _DDPM
    prefix_step: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method is {self.method!r}: use one of {', '.join(METHODS)}")

    @property
    def copies(self) -> int:
        """Rows a video has in the network."""
        return 1 if self.sampler.guidance == 1.0 else 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitVideoModel:
    """A model taken apart for jitted functions, its layers one by one.

    Attributes:
        params: all but the layers, of which only the first is there.
        layers: of each layer, see `split_layers`.
        graph: to put it together again.
        config: its sizes.
    """

    params: Any
    layers: LayerParams
    graph: Any = dataclasses.field(metadata={"static": True})
    config: VideoDiTConfig = dataclasses.field(metadata={"static": True})

    def merge(self) -> VideoDiT:
        """The module; its calls want `layers=`."""
        return nnx.merge(self.graph, self.params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutState:
    """A video in the making.

    Attributes:
        keys: key[B], of each video.
        number: int32 scalar, chunks made.
        ring: the cache of "ca2", or None.
        history: float32[B, n, height, width, C], the frames that other methods compute again.
        given: how many frames the video began with.
    """

    keys: Array
    number: Array
    ring: FrameRing | None
    history: Array | None
    given: int = dataclasses.field(metadata={"static": True})


def split_video_model(model: VideoDiT, *, consume: bool = False) -> SplitVideoModel:
    """Takes a model apart; `consume` deletes the stacked layers as it goes."""
    graph, params = nnx.split(model)
    params, layers = split_layers(params, consume=consume)
    return SplitVideoModel(params, layers, graph, model.config)


def start(
    model: SplitVideoModel, frames: Array, keys: Array, options: Rollout, text: Text | None = None
) -> RolloutState:
    """The state after the given frames.

    Args:
        model: of the video.
        frames: float32[B, n, height, width, C], what the videos begin with, at least one frame.
        keys: key[B]; a video's noise depends on its own alone.
        options: how it is made.
        text: of each row in the network: with guidance, B rows without text and B rows with it.
    """
    if not frames.shape[1]:
        raise InputError("a video needs a first frame: give one, or let one be drawn")
    number = jnp.int32(0)
    if options.method == "ca2":
        ring = model.config.ring(options.copies * frames.shape[0], options.dtype).init()
        ring = _write(model, ring, frames, keys, number, text, options=options)
        return RolloutState(keys, number, ring, None, frames.shape[1])
    frames = frames.astype(jnp.float32)
    if options.method == "os-fix":  # it knows one length only
        before = jnp.broadcast_to(frames[:, :1], (len(keys), model.config.chunk, *frames.shape[2:]))
        frames = jnp.concatenate([before, frames], axis=1)
    return RolloutState(keys, number, None, _keep(model, frames, options), frames.shape[1])


def next_chunk(
    model: SplitVideoModel, state: RolloutState, options: Rollout, text: Text | None = None
) -> tuple[RolloutState, Array]:
    """One more chunk, float32[B, chunk, height, width, C]. The cache of the state is donated."""
    if state.ring is not None:
        ring, chunk = _next_cached(
            model, state.ring, state.keys, state.number, text, options=options
        )
        return dataclasses.replace(state, ring=ring, number=state.number + 1), chunk
    assert state.history is not None
    chunk = _next_recomputed(
        model, state.history, state.keys, state.number, text, options=options, given=state.given
    )
    history = _keep(model, jnp.concatenate([state.history, chunk], axis=1), options)
    return dataclasses.replace(state, history=history, number=state.number + 1), chunk


def rollout(
    model: SplitVideoModel,
    frames: Array,
    keys: Array,
    options: Rollout,
    text: Text | None = None,
) -> Iterator[Array]:
    """The chunks behind the given frames, without end; arguments as for `start`."""
    state = start(model, frames, keys, options, text)
    while True:
        state, chunk = next_chunk(model, state, options, text)
        yield chunk


def history_mask(config: VideoDiTConfig, frames: int, given: int) -> Array:
    """Which frame of a history sees which through a cache: bool[1, T, T].

    A frame sees the frames before it in its chunk, and of those before its chunk the ones that the
    cache held then. (Through these, in deeper layers, it still learns of frames that have left.)
    """
    frame = jnp.arange(frames)
    begins = jnp.where(frame < given, 0, given + (frame - given) // config.chunk * config.chunk)
    held = frame[None] >= begins[:, None] - (config.max_prefix - config.sink_frames)
    return ((frame[None] <= frame[:, None]) & (held | (frame[None] < config.sink_frames)))[None]


def _keep(model: SplitVideoModel, frames: Array, options: Rollout) -> Array:
    """The part of the history that is computed again."""
    config = model.config
    most = {"os-ext": config.max_prefix, "os-fix": config.chunk}.get(options.method)
    return frames if most is None else frames[:, -most:]


def _lightly(frames: Array, keys: Array, number: Array, options: Rollout) -> Array:
    """Clean frames with the noise that the network is used to see in them."""
    if options.prefix_step is None:
        return frames
    noise = row_noise(_of_chunk(keys, number), _PREFIX, frames.shape[1:])
    step = jnp.full(frames.shape[:1], options.prefix_step, jnp.int32)
    return add_noise(linear_schedule(), frames, noise, step)


def _of_chunk(keys: Array, number: Array) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def _sample(
    call: Callable[[Array, Array], Array], keys: Array, config: VideoDiTConfig, options: Rollout
) -> Array:
    """A chunk from noise, with a network of `options.copies` rows a video."""
    shape = (config.chunk, config.height, config.width, config.channels)

    def denoise(x: Array, t: Array) -> Array:
        x, t = (jnp.concatenate([y] * options.copies) for y in (x, t))
        out = call(x, t)
        scale = options.sampler.guidance
        return out if options.copies == 1 else guided(out, config.channels, scale)

    return sample(denoise, row_noise(keys, _START, shape), keys, options.sampler)


@functools.partial(jax.jit, static_argnames="options", donate_argnums=1)
def _write(
    model: SplitVideoModel, ring: FrameRing, frames: Array, keys: Array, number: Array,
    text: Text | None, *, options: Rollout,
) -> FrameRing:  # fmt: skip
    frames = _lightly(frames.astype(jnp.float32), keys, number, options)
    frames = jnp.concatenate([frames] * options.copies)
    return model.merge().write(frames, ring, text, layers=model.layers)


@functools.partial(jax.jit, static_argnames="options", donate_argnums=1)
def _next_cached(
    model: SplitVideoModel, ring: FrameRing, keys: Array, number: Array, text: Text | None,
    *, options: Rollout,
) -> tuple[FrameRing, Array]:  # fmt: skip
    """Every denoising step reads the cache; the clean chunk is written once."""
    module = model.merge()

    def call(x: Array, t: Array) -> Array:
        return module.denoise(x, t, ring, text, layers=model.layers, finite=True)

    chunk = _sample(call, _of_chunk(keys, number), model.config, options)
    clean = jnp.concatenate([_lightly(chunk, keys, number + 1, options)] * options.copies)
    return module.write(clean, ring, text, layers=model.layers), chunk


@functools.partial(jax.jit, static_argnames=("options", "given"))
def _next_recomputed(
    model: SplitVideoModel, history: Array, keys: Array, number: Array, text: Text | None,
    *, options: Rollout, given: int,
) -> Array:  # fmt: skip
    """Every denoising step computes the history too. Compiled for each of its lengths."""
    module, config, frames = model.merge(), model.config, history.shape[1]
    mask = None
    if options.method == "joint":
        mask = history_mask(config, frames + config.chunk, given)
    rows = options.copies * history.shape[0]
    before = jnp.concatenate([_lightly(history, keys, number, options)] * options.copies)

    def call(x: Array, t: Array) -> Array:
        zeros = jnp.zeros((rows, frames), t.dtype)
        times = jnp.broadcast_to(t[:, None], (rows, config.chunk))
        out = module(
            jnp.concatenate([before, x], axis=1), jnp.concatenate([zeros, times], axis=1),
            prefix=frames, mask=mask, text=text, layers=model.layers,
        )  # fmt: skip
        return out[:, frames:]

    return _sample(call, _of_chunk(keys, number), config, options)
