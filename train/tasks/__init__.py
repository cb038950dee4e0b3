"""The tasks: where the data of the training programs comes from."""

from kvjax.train.tasks.example import Setting
from kvjax.train.tasks.mixture import AGGREGATION, TASKS, Mixture, make_task
from kvjax.train.tasks.records import (
    Difficulty,
    Example,
    Record,
    exact_match,
    make_example,
)

__all__ = [
    "AGGREGATION",
    "TASKS",
    "Difficulty",
    "Example",
    "Mixture",
    "Record",
    "Setting",
    "exact_match",
    "make_example",
    "make_task",
]
