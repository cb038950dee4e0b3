"""Batches for the training loop: grain datasets, whose place is saved with every checkpoint.

The loop takes any `grain.IterDataset`. This makes one of a function of the step's number, which is
what programs here have whose data are made and not read.
"""

from collections.abc import Callable
from typing import Any

import grain
from absl import flags

__all__ = ["step_dataset"]


def step_dataset(
    batch: Callable[[int], Any], steps: int, *, workers: int = 0
) -> grain.IterDataset[Any]:
    """The batches of steps 0 to `steps - 1`, in order, made ahead of when they are wanted.

    Args:
        batch: the batch of a step by its number, a tree of numpy arrays; pure. With workers it is
            pickled and must not use a device.
        steps: how many.
        workers: processes that make them; 0 is a thread of this process.
    """
    dataset = grain.MapDataset.range(steps).map(batch)
    if not workers:
        return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    if not flags.FLAGS.is_parsed():  # grain asks its flags there; ours is no program of absl's
        flags.FLAGS.mark_as_parsed()
    inline = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=4)
    return dataset.to_iter_dataset(inline).mp_prefetch(options)
