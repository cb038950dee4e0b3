"""The game Countdown as a task: problems with a random play that solves each.

No answer is the only one, so it is not among `TASKS`, whose answers are. What a model learns from
it is to play as the plays do: legally, and with the target in sight. See
`kvjax.models.countdown.game` for the rules and the judge.
"""

import numpy as np

from kvjax.models.countdown.game import draw_problem
from kvjax.train.tasks.example import Example, Setting

__all__ = ["countdown"]


def countdown(rng: np.random.Generator, setting: Setting) -> Example:
    """A problem, and a play that solves it; of the setting nothing matters."""
    del setting
    problem, play = draw_problem(rng)
    return Example("countdown", "", (problem.text,), (play,))
