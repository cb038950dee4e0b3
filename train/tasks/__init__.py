"""The tasks: where the data of the training programs comes from."""

from kvjax.train.tasks.example import Example, Setting
from kvjax.train.tasks.mixture import AGGREGATION, TASKS, Mixture, make_task

__all__ = ["AGGREGATION", "TASKS", "Example", "Mixture", "Setting", "make_task"]
