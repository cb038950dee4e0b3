"""Batches by the number of the step, and the place in them."""

import json

import numpy as np
import pytest

from kvjax.train.data import step_dataset


def batch(step):
    return {"tokens": np.full((2, 3 + step % 2), step, np.int32), "window": None}


def steps_of(iterator, count):
    return [int(next(iterator)["tokens"][0, 0]) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_come_in_order_and_go_on_from_a_saved_place(workers):
    data = step_dataset(batch, 9, workers=workers)
    iterator = iter(data)
    assert steps_of(iterator, 4) == [0, 1, 2, 3]
    place = json.loads(json.dumps(iterator.get_state()))
    assert steps_of(iterator, 5) == [4, 5, 6, 7, 8]
    with pytest.raises(StopIteration):
        next(iterator)
    resumed = iter(data)
    resumed.set_state(place)
    assert steps_of(resumed, 5) == [4, 5, 6, 7, 8]


def test_shapes_may_change_and_nothing_may_be_none():
    first, second = (x["tokens"].shape for x, _ in zip(step_dataset(batch, 2), "ab", strict=True))
    assert (first, second) == ((2, 3), (2, 4))
