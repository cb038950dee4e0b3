"""The training loop that every program here shares: data, steps, checkpoints, metrics.

The step is a jitted function of the state and a batch, and the data an iterator whose place is
saved with the state. So a run that was killed goes on from its last checkpoint as if nothing had
happened: same data, same parameters, same lines of metrics, bit for bit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import Mesh, NamedSharding

from kvjax.errors import InputError
from kvjax.train.checkpoints import open_checkpoints
from kvjax.train.flops import peak_flops
from kvjax.train.metrics import MetricsLog, Work, open_tensorboard
from kvjax.train.step import Step, TrainState, place_batch

__all__ = ["run"]


def run(
    step: Step,
    state: TrainState,
    data: grain.IterDataset[Any],
    *,
    steps: int,
    folder: Path,
    save_every: int,
    log_every: int,
    keep_last: int = 2,
    keep_every: int | None = None,
    work: Callable[[Any], Work] | None = None,
    tensorboard: bool = False,
    after_save: Callable[[TrainState], None] | None = None,
) -> TrainState:
    """Takes steps until there are `steps` of them, from the folder's last checkpoint if it has one.

    Writes `folder`/checkpoints, `folder`/metrics.jsonl (the step, and the means of the metrics
    since the last line) and `folder`/speed.jsonl (tokens a second, and the model FLOP utilisation
    where the device's peak is known).

    Args:
        step: from `make_step`.
        state: where training starts, from `init_state`; donated. Its mesh is the run's, and a
            checkpoint of another mesh is taken over.
        data: the batches, one a step, see `place_batch`.
        steps: how many steps in all.
        folder: of the run; made where it does not exist.
        save_every: steps between checkpoints; the last step makes one too.
        log_every: steps between lines of metrics.
        keep_last: how many of the newest checkpoints are kept.
        keep_every: checkpoints of steps that this divides are kept too.
        work: what a batch is, for the speed; None reports none.
        tensorboard: whether to write `folder`/tensorboard too.
        after_save: is called with the state whenever a checkpoint was begun, to show what the model
            can do so far; it must not keep the state.

    Raises:
        InputError: the loss or the gradient is not finite, the disk is full, or the data end early;
            the last good checkpoint is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mesh, iterator = _mesh(state), iter(data)
    with open_checkpoints(
        folder / "checkpoints", keep_last=keep_last, keep_every=keep_every
    ) as checkpoints:
        state, pending = checkpoints.restore(state, iterator)
        first = int(state.step)
        log = MetricsLog(
            folder, first=first, steps=steps, log_every=log_every, pending=pending,
            peak_flops=_peak(mesh), kept=checkpoints.kept,
            tensorboard=open_tensorboard(folder / "tensorboard", first) if tensorboard else None,
        )  # fmt: skip
        try:
            for done in range(first + 1, steps + 1):
                batch = _next(iterator, done)
                state, metrics = step(state, place_batch(batch, mesh))
                log.add(done, metrics, work(batch) if work else Work(0))
                if done % save_every == 0 or done == steps:
                    log.flush()  # A checkpoint is good: its loss was finite, its lines are written.
                    checkpoints.save(done, state, iterator, log.pending())
                    if after_save is not None:
                        after_save(state)
            checkpoints.finish()
        except OSError as error:
            raise InputError(
                f"{folder}: writing failed ({error}); {checkpoints.kept()}: make room and run the "
                "same command again"
            ) from None
        finally:
            log.close()
            iterator.close()  # ends grain's workers
    return state


def _next(iterator: grain.DatasetIterator, step: int) -> Any:
    try:
        return next(iterator)
    except StopIteration:
        raise InputError(
            f"the data end before step {step}: repeat them, or ask for fewer steps"
        ) from None


def _mesh(state: TrainState) -> Mesh | None:
    sharding = state.step.sharding
    found = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return found if isinstance(found, Mesh) else None


def _peak(mesh: Mesh | None) -> float | None:
    """FLOP/s of all of the run's devices, where their kind is known."""
    devices = list(mesh.devices.flat) if mesh is not None else jax.devices()[:1]
    one = peak_flops(devices[0].device_kind)
    return one and one * len(devices)
