"""Noise schedules and the algebra between data, noise and what a network predicts.

Names and formulas are those of Ho et al. 2020 (DDPM) and Nichol and Dhariwal 2021 (learned
variance, respacing). Tables are computed in float64 on the host and rounded where they are used.

Shapes: x [B, ...] of any rank, steps int32[B], places in a schedule's tables.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.errors import InputError

__all__ = [
    "PREDICTIONS", "Prediction", "Schedule", "add_noise", "linear_schedule", "log_variance",
    "posterior_mean", "respace", "split_output", "table_at", "target",
]  # fmt: skip

Array = jax.Array
PREDICTIONS = ("eps", "x0", "v")


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """How much noise there is at each step, from little to much.

    Attributes:
        timesteps: int64[N], each step's timestep on the scale of training; the network is told
            these, also where only some steps are kept.
        alpha_bar: float64[N], what is left of the data's variance.
    """

    timesteps: np.ndarray
    alpha_bar: np.ndarray

    @functools.cached_property
    def alpha_bar_before(self) -> np.ndarray:
        """alpha_bar of the step before, 1 before the first."""
        return np.concatenate([[1.0], self.alpha_bar[:-1]])

    @functools.cached_property
    def beta(self) -> np.ndarray:
        """The noise's variance that a step adds."""
        return 1 - self.alpha_bar / self.alpha_bar_before

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """Of q(x_{t-1} | x_t, x_0)."""
        return self.beta * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """Its logarithm; the first, which is of 0, is replaced by the second."""
        clipped = np.concatenate([self.posterior_variance[1:2], self.posterior_variance[1:]])
        return np.log(clipped) if len(clipped) == len(self.beta) else np.log(self.beta)

    def __len__(self) -> int:
        return len(self.timesteps)


def linear_schedule(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """Betas that grow evenly (Ho et al. 2020), stretched to other numbers of steps than 1000."""
    beta = np.linspace(first, last, steps) * 1000 / steps
    return Schedule(np.arange(steps), np.cumprod(1 - beta))


def respace(schedule: Schedule, steps: int) -> Schedule:
    """The schedule on `steps` of its steps, evenly from the first to the last.

    Raises:
        InputError: it does not have so many.
    """
    if not 1 <= steps <= len(schedule):
        raise InputError(f"{steps} sampling steps: use 1 to {len(schedule)}")
    if steps == 1:
        kept = np.array([len(schedule) - 1])
    else:
        kept = np.round(np.arange(steps) * ((len(schedule) - 1) / (steps - 1))).astype(int)
    return Schedule(schedule.timesteps[kept], schedule.alpha_bar[kept])


def table_at(table: np.ndarray, step: Array, rank: int) -> Array:
    """Entries of a table as float32[B, 1, ...] of a rank."""
    return jnp.asarray(table, jnp.float32)[step].reshape(-1, *(1,) * (rank - 1))


def add_noise(schedule: Schedule, x0: Array, noise: Array, step: Array) -> Array:
    """x_t, a sample of q(x_t | x_0): data x0 and standard normal noise [B, ...] at steps [B]."""
    keep = table_at(np.sqrt(schedule.alpha_bar), step, x0.ndim)
    return keep * x0 + table_at(np.sqrt(1 - schedule.alpha_bar), step, x0.ndim) * noise


class Prediction(NamedTuple):
    """What a network's output says: the data and the noise, [B, ...]."""

    x0: Array
    eps: Array


def split_output(
    schedule: Schedule, kind: str, x: Array, out: Array, step: Array
) -> tuple[Prediction, Array | None]:
    """Data and noise from an output of any kind, and the variance's part where there is one.

    Args:
        schedule: whose steps are meant.
        kind: "eps" (noise), "x0" (data) or "v" (Salimans and Ho 2022).
        x: x_t [..., C].
        out: [..., C], or [..., 2 C] with a learned variance.
        step: int32[B].
    """
    channels = x.shape[-1]
    value = out[..., :channels]
    variance = out[..., channels:] if out.shape[-1] > channels else None
    signal = table_at(np.sqrt(schedule.alpha_bar), step, x.ndim)
    sigma = table_at(np.sqrt(1 - schedule.alpha_bar), step, x.ndim)
    if kind == "eps":
        return Prediction((x - sigma * value) / signal, value), variance
    if kind == "x0":
        return Prediction(value, (x - signal * value) / sigma), variance
    if kind == "v":
        return Prediction(signal * x - sigma * value, sigma * x + signal * value), variance
    raise InputError(f"prediction is {kind!r}: use one of {', '.join(PREDICTIONS)}")


def target(schedule: Schedule, kind: str, x0: Array, noise: Array, step: Array) -> Array:
    """What an output of a kind should be."""
    if kind not in PREDICTIONS:
        raise InputError(f"prediction is {kind!r}: use one of {', '.join(PREDICTIONS)}")
    if kind != "v":
        return noise if kind == "eps" else x0
    signal = table_at(np.sqrt(schedule.alpha_bar), step, x0.ndim)
    return signal * noise - table_at(np.sqrt(1 - schedule.alpha_bar), step, x0.ndim) * x0


def posterior_mean(schedule: Schedule, x0: Array, x: Array, step: Array) -> Array:
    """The mean of q(x_{t-1} | x_t, x_0)."""
    beta, before, rest = schedule.beta, schedule.alpha_bar_before, 1 - schedule.alpha_bar
    of_x0 = table_at(beta * np.sqrt(before) / rest, step, x.ndim)
    return of_x0 * x0 + table_at((1 - before) * np.sqrt(1 - beta) / rest, step, x.ndim) * x


def log_variance(schedule: Schedule, variance: Array | None, x: Array, step: Array) -> Array:
    """The reverse step's log variance: between the posterior's (at -1) and log beta (at 1).

    Without a learned one it is the posterior's, [B, 1, ...].
    """
    low = table_at(schedule.posterior_log_variance, step, x.ndim)
    if variance is None:
        return low
    part = (variance + 1) / 2
    return part * table_at(np.log(schedule.beta), step, x.ndim) + (1 - part) * low
