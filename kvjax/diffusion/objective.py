"""Ca2-VDM's training objective: noisy frames behind a clean prefix, whose length is drawn.

Shapes: videos [B, T, height, width, C] (rows, frames, latents). All functions are pure and take
keys; every row draws for itself, so that a batch may be split over devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.diffusion.schedule import (
    Schedule,
    add_noise,
    log_variance,
    posterior_mean,
    split_output,
    table_at,
    target,
)

__all__ = ["Loss", "NoisyClip", "draw_offset", "draw_prefix", "noisy_clip", "prefix_loss"]

Array = jax.Array


class NoisyClip(NamedTuple):
    """What the network is shown, and what it is asked about.

    Attributes:
        x: float32[B, T, ...]: clean (or lightly noised) frames, then noisy ones.
        t: int32[B, T], 0 for the prefix.
        target: bool[B, T], the frames that count: one chunk behind the prefix.
        step: int32[B], the noise level of the targets.
    """

    x: Array
    t: Array
    target: Array
    step: Array


def draw_prefix(key: Array, rows: int, frames: int, chunk: int) -> Array:
    """Lengths of clean prefixes, int32[rows]: evenly from 1, 1 + chunk, 1 + 2 chunk, ...

    Args:
        key: of the draw.
        rows: how many.
        frames: T of the clips; behind every prefix a whole chunk fits.
        chunk: frames that are denoised at a time.
    """
    choices = max(1, (frames - 1) // chunk)
    return 1 + chunk * jax.random.randint(key, (rows,), 0, choices)


def draw_offset(
    key: Array, prefix: Array, chunk: int, table: int, *, always: bool = False
) -> Array:
    """Where in the cyclic position table each row begins, int32[B].

    Args:
        key: of the draw.
        prefix: int32[B], from `draw_prefix`.
        chunk: frames behind the prefix.
        table: rows of the position table.
        always: shift every row (the paper's text); otherwise only rows that fill the table, the
            only ones that generation ever shifts (the released code), and others begin at 0.
    """
    drawn = jax.random.randint(key, prefix.shape, 0, table)
    return drawn if always else jnp.where(prefix + chunk == table, drawn, 0)


def noisy_clip(
    schedule: Schedule, x0: Array, noise: Array, step: Array, prefix: Array, chunk: int,
    *, prefix_step: int | None = None, prefix_noise: Array | None = None,
) -> NoisyClip:  # fmt: skip
    """Clean frames before, noisy frames behind.

    Args:
        schedule: with all its steps.
        x0: float32[B, T, ...], the clip.
        noise: float32[B, T, ...], standard normal.
        step: int32[B], the noise level of the targets.
        prefix: int32[B], how many frames are clean.
        chunk: how many behind them count. Frames after these are noisy too; in a causal model
            nobody sees them.
        prefix_step: a light noise level for the prefix, which keeps timestep 0 (the released code
            trains at 100); None leaves it clean (the paper).
        prefix_noise: float32[B, T, ...], for it.
    """
    frame = jnp.arange(x0.shape[1], dtype=jnp.int32)[None]
    clean = frame < prefix[:, None]
    before = x0
    if prefix_step is not None:
        assert prefix_noise is not None, "prefix_step needs prefix_noise"
        before = add_noise(schedule, x0, prefix_noise, jnp.full_like(step, prefix_step))
    wide = clean.reshape(*clean.shape, *(1,) * (x0.ndim - 2))
    x = jnp.where(wide, before, add_noise(schedule, x0, noise, step))
    timesteps = jnp.asarray(schedule.timesteps, jnp.int32)[step]
    t = jnp.where(clean, 0, timesteps[:, None])
    return NoisyClip(x, t, ~clean & (frame < prefix[:, None] + chunk), step)


class Loss(NamedTuple):
    """Means over each row's targets, float32[B].

    Attributes:
        loss: what is minimised, mse + vb, or mse with a weight.
        mse: the squared error of the prediction.
        vb: the variational bound in bits, which teaches the variance alone; 0 without.
    """

    loss: Array
    mse: Array
    vb: Array


def prefix_loss(
    schedule: Schedule, out: Array, clip: NoisyClip, x0: Array, noise: Array,
    *, prediction: str = "eps", x0_weight: float = 1.0,
) -> Loss:  # fmt: skip
    """The masked loss of a network's output.

    Args:
        schedule: with all its steps.
        out: float32[B, T, ..., C], or [..., 2 C] with a learned variance.
        clip: what the network was shown.
        x0: float32[B, T, ..., C], the clip without noise.
        noise: what was added, of the same shape.
        prediction: "eps", "x0" or "v".
        x0_weight: of "x0" the error counts 1 + SNR times, as it would as one of v (Salimans and Ho
            2022), but at most so many times. 1 is the plain squared error, which hardly asks about
            little noise; without a bound it asks about nothing else.
    """
    channels = x0.shape[-1]
    wanted = target(schedule, prediction, x0, noise, clip.step)
    mse = _mean((out[..., :channels] - wanted) ** 2, clip.target)
    loss = mse
    if prediction == "x0":
        loss = loss * table_at(np.minimum(1 / (1 - schedule.alpha_bar), x0_weight), clip.step, 1)
    if out.shape[-1] == channels:
        return Loss(loss, mse, jnp.zeros_like(mse))
    # The bound teaches the variance and must not move the prediction.
    still = jax.lax.stop_gradient(out[..., :channels])
    still = jnp.concatenate([still, out[..., channels:]], axis=-1)
    vb = _mean(_bound(schedule, prediction, clip.x, still, x0, clip.step), clip.target)
    return Loss(loss + vb, mse, vb)


def _mean(value: Array, chosen: Array) -> Array:
    """Over a row's chosen frames: [B, T, ...] and bool[B, T] -> [B]."""
    value = jnp.mean(value.reshape(*value.shape[:2], -1), axis=-1)
    weight = chosen.astype(value.dtype)
    return jnp.sum(jnp.where(chosen, value, 0.0), axis=1) / jnp.sum(weight, axis=1)


def _bound(
    schedule: Schedule, prediction: str, x: Array, out: Array, x0: Array, step: Array
) -> Array:
    """Each element's term of the variational bound, bits."""
    found, variance = split_output(schedule, prediction, x, out, step)
    mean = posterior_mean(schedule, found.x0, x, step)
    true_mean = posterior_mean(schedule, x0, x, step)
    log_var = log_variance(schedule, variance, x, step)
    true_log_var = table_at(schedule.posterior_log_variance, step, x.ndim)
    difference = (true_mean - mean) ** 2 * jnp.exp(-log_var)
    kl = 0.5 * (log_var - true_log_var + jnp.exp(true_log_var - log_var) - 1 + difference)
    first = (step == 0).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(first, -_discretised(x0, mean, 0.5 * log_var), kl) / np.log(2.0)


def _discretised(x: Array, mean: Array, log_sigma: Array) -> Array:
    """Log-probability of values in [-1, 1] with 256 levels under a normal (Ho et al. 2020)."""
    inverse, centred = jnp.exp(-log_sigma), x - mean
    high, low = inverse * (centred + 1 / 255), inverse * (centred - 1 / 255)
    # Differences of small numbers, not of numbers near 1: float32 has no 1 - 1e-12.
    turned = centred > 0
    near = _normal_cdf(jnp.where(turned, -low, high))
    inside = near - _normal_cdf(jnp.where(turned, -high, low))
    inside = jnp.where(x > 0.999, _normal_cdf(-low), inside)
    return jnp.log(jnp.maximum(jnp.where(x < -0.999, _normal_cdf(high), inside), 1e-12))


def _normal_cdf(x: Array) -> Array:
    """Of the standard normal, in the approximation of the released code (Page 1977)."""
    return jax.nn.sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
