"""Diffusion: noise schedules, what a network predicts, samplers, and the training objective."""

from kvjax.diffusion.objective import NoisyClip, draw_offset, draw_prefix, noisy_clip, prefix_loss
from kvjax.diffusion.sampler import Sampler, guided, sample
from kvjax.diffusion.schedule import Schedule, add_noise, linear_schedule, respace, split_output

__all__ = [
    "NoisyClip",
    "Sampler",
    "Schedule",
    "add_noise",
    "draw_offset",
    "draw_prefix",
    "guided",
    "linear_schedule",
    "noisy_clip",
    "prefix_loss",
    "respace",
    "sample",
    "split_output",
]
