"""Samplers: from noise to data with a network that says what is noise.

All are loops of one shape, so that one compiled program makes every chunk of a video. The noise of
a row depends on its key alone, not on its batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.diffusion.schedule import (
    PREDICTIONS,
    Schedule,
    add_noise,
    linear_schedule,
    log_variance,
    posterior_mean,
    respace,
    split_output,
    table_at,
)
from kvjax.errors import InputError

__all__ = ["Denoise", "Sampler", "guided", "row_noise", "sample"]

Array = jax.Array
Denoise = Callable[[Array, Array], Array]
"""(x_t [B, ...], timesteps int32[B]) -> output [B, ...], with the variance behind if learned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a chunk is denoised.

    Attributes:
        kind: "ddpm", ancestral with learned variance, as the paper samples; "ddim" (Song et al.
            2021), without new noise at eta 0; "few_step": predict the data, add noise again for
            the next step, as few-step students do.
        steps: how many calls of the network. They stand evenly between the first and the last
            timestep; those of "few_step" evenly from the last one down, and none at the end.
        prediction: what the network predicts: "eps", "x0" or "v".
        guidance: of classifier-free guidance; 1 is the network with its text alone.
        eta: of DDIM: 0 is deterministic, 1 has DDPM's variance.
        clip: the predicted data is kept in [-clip, clip]; None: as it is.
    """

    kind: str = "ddpm"
    steps: int = 100
    prediction: str = "eps"
    guidance: float = 1.0
    eta: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("ddpm", "ddim", "few_step"):
            raise InputError(f"sampler is {self.kind!r}: use ddpm, ddim or few_step")
        if self.prediction not in PREDICTIONS:
            raise InputError(f"prediction is {self.prediction!r}: use one of {PREDICTIONS}")

    @property
    def schedule(self) -> Schedule:
        """The steps that are taken, of the linear schedule with 1000."""
        whole = linear_schedule()
        if self.kind != "few_step":
            return respace(whole, self.steps)
        kept = np.round(len(whole) * np.arange(1, self.steps + 1) / self.steps).astype(int) - 1
        return Schedule(whole.timesteps[kept], whole.alpha_bar[kept])


def row_noise(keys: Array, number: Array | int, shape: tuple[int, ...]) -> Array:
    """Standard normal float32[B, *shape] from each row's key and a number.

    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> bool((row_noise(keys, 5, (2,))[1] == row_noise(keys[1:2], 5, (2,))[0]).all())
    True
    """

    def one(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, number), shape)

    return jax.vmap(one)(keys)


def guided(out: Array, channels: int, scale: float) -> Array:
    """Classifier-free guidance of the prediction; the variance is that of the rows with text.

    Args:
        out: [2 B, ...]: B rows without text, then the same B rows with it.
        channels: how many of the last axis are the prediction.
        scale: 1 gives the rows with text.
    """
    null, text = jnp.split(out, 2)
    moved = null[..., :channels] + scale * (text[..., :channels] - null[..., :channels])
    # At 1 exactly the text's: null + (text - null) would round.
    moved = text[..., :channels] if scale == 1.0 else moved
    return jnp.concatenate([moved, text[..., channels:]], axis=-1)


def sample(denoise: Denoise, noise: Array, keys: Array, sampler: Sampler) -> Array:
    """Denoises from pure noise.

    Args:
        denoise: the network, with whatever it is conditioned on.
        noise: float32[B, ...], standard normal.
        keys: key[B], for the noise on the way.
        sampler: how.

    Returns:
        float32[B, ...], data.
    """
    schedule = sampler.schedule
    update = {"ddpm": _ddpm, "ddim": _ddim, "few_step": _few_step}[sampler.kind]
    timesteps = jnp.asarray(schedule.timesteps, jnp.int32)

    def one(x: Array, index: Array) -> tuple[Array, None]:
        step = jnp.full(x.shape[:1], index, jnp.int32)
        out = denoise(x, timesteps[step])
        fresh = functools.partial(row_noise, keys, index, x.shape[1:])
        return update(schedule, sampler, x, out, step, fresh), None

    order = jnp.arange(sampler.steps - 1, -1, -1, dtype=jnp.int32)
    return jax.lax.scan(one, noise, order)[0]


def _predict(
    schedule: Schedule, sampler: Sampler, x: Array, out: Array, step: Array
) -> tuple[Array, Array, Array | None]:
    """Data, noise and the variance's part; clipped data takes its noise along."""
    found, variance = split_output(schedule, sampler.prediction, x, out, step)
    x0, eps = found
    if sampler.clip is not None:
        x0 = jnp.clip(x0, -sampler.clip, sampler.clip)
        eps = split_output(schedule, "x0", x, x0, step)[0].eps
    return x0, eps, variance


def _ddpm(
    schedule: Schedule, sampler: Sampler, x: Array, out: Array, step: Array, fresh: Any
) -> Array:
    x0, _, variance = _predict(schedule, sampler, x, out, step)
    sigma = jnp.exp(0.5 * log_variance(schedule, variance, x, step))
    moved = posterior_mean(schedule, x0, x, step)
    return moved + jnp.where(_rows(step > 0, x), sigma * fresh(), 0.0)


def _ddim(
    schedule: Schedule, sampler: Sampler, x: Array, out: Array, step: Array, fresh: Any
) -> Array:
    x0, eps, _ = _predict(schedule, sampler, x, out, step)
    before = schedule.alpha_bar_before
    sigma = sampler.eta * np.sqrt(schedule.posterior_variance)
    moved = table_at(np.sqrt(before), step, x.ndim) * x0
    moved = moved + table_at(np.sqrt(np.maximum(1 - before - sigma**2, 0)), step, x.ndim) * eps
    if not sampler.eta:
        return moved
    return moved + table_at(sigma, step, x.ndim) * fresh()


def _few_step(
    schedule: Schedule, sampler: Sampler, x: Array, out: Array, step: Array, fresh: Any
) -> Array:
    x0, _, _ = _predict(schedule, sampler, x, out, step)
    again = add_noise(schedule, x0, fresh(), jnp.maximum(step - 1, 0))
    return jnp.where(_rows(step > 0, x), again, x0)


def _rows(condition: Array, x: Array) -> Array:
    return condition.reshape(-1, *(1,) * (x.ndim - 1))
