"""The tasks: where the data of the training programs comes from."""

from kvjax.train.tasks.records import (
    Difficulty,
    Example,
    Record,
    exact_match,
    make_example,
)

__all__ = ["Difficulty", "Example", "Record", "exact_match", "make_example"]
