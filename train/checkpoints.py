"""Checkpoints of a run: the state, the place in the data, and metrics that no line has yet.

Orbax writes them in the background. That is safe beside donation: before `save` returns, arrays of
an accelerator are copied to the host, and on a CPU, where the host reads the very buffers, JAX
copies instead of donating for as long as they are read.
"""

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import grain.checkpoint
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from kvjax.errors import InputError

__all__ = ["Checkpoints", "open_checkpoints"]

# Room for the files around the arrays.
_SPARE_BYTES = 4 * 2**20


class Checkpoints:
    """The checkpoints of one run, from `open_checkpoints`."""

    def __init__(self, folder: Path, manager: ocp.CheckpointManager) -> None:
        self.folder: Path = folder
        self._manager = manager

    def save(self, step: int, state: Any, data: grain.DatasetIterator, pending: Any) -> None:
        """Begins a checkpoint of step `step`; when this returns, the state may be donated.

        Args:
            step: how many steps were taken.
            state: any pytree of arrays.
            data: the iterator; its place is noted, not moved.
            pending: plain JSON values, see `MetricsLog.pending`.

        Raises:
            InputError: there is no room for it, or writing this or the last one failed.
        """
        with self._explained():
            self._manager.wait_until_finished()
            self._check_room(step, state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(data),
                    pending=ocp.args.JsonSave(pending),
                ),
            )

    def restore(self, state: Any, data: grain.DatasetIterator) -> tuple[Any, Any]:
        """The last checkpoint, or what is given and no pending metrics where there is none.

        Args:
            state: a tree like the saved one. Its places are those that the result has, whatever
                mesh the checkpoint was written on.
            data: the iterator, which moves to its place.
        """
        last = self._manager.latest_step()
        if last is None:
            return state, {}
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        try:
            restored: Any = self._manager.restore(
                last,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like),
                    data=grain.checkpoint.CheckpointRestore(data),
                    pending=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            raise InputError(
                f"{self.folder / str(last)} does not hold what this run needs "
                f"({_one_line(error)}): give another folder, or remove that checkpoint"
            ) from None
        return restored.state, restored.pending

    def kept(self) -> str:
        """What a message may say of the last checkpoint that is whole."""
        with contextlib.suppress(Exception):  # what failed is being told already
            self._manager.wait_until_finished()
        last = self._manager.latest_step()
        if last is None:
            return "there is no checkpoint yet"
        return f"the last checkpoint, {self.folder / str(last)}, is kept"

    def finish(self) -> None:
        """Waits until everything is written.

        Raises:
            InputError: writing failed.
        """
        with self._explained():
            self._manager.wait_until_finished()

    def _check_room(self, step: int, state: Any) -> None:
        shards = [s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards
                  if s.replica_id == 0]  # fmt: skip
        needed, free = sum(shards) + _SPARE_BYTES, shutil.disk_usage(self.folder).free
        if free < needed:
            raise InputError(
                f"{self.folder}: the disk has {free / 2**20:.0f} MiB left and the checkpoint of "
                f"step {step} needs {needed / 2**20:.0f} MiB; {self.kept()}: make room and run the "
                "same command again"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what the disk refuses into one line; tensorstore has ValueErrors of its own."""
        try:
            yield
        except InputError:
            raise
        except (OSError, ValueError) as error:
            text = _one_line(error)
            if isinstance(error, ValueError) and "os_error_code" not in text:
                raise
            for left in self.folder.glob("*.orbax-checkpoint-tmp"):  # it may be what fills the disk
                shutil.rmtree(left, ignore_errors=True)
            raise InputError(
                f"{self.folder}: writing a checkpoint failed ({text}); {self.kept()}: "
                "make room and run the same command again"
            ) from None


@contextlib.contextmanager
def open_checkpoints(
    folder: Path, *, keep_last: int = 2, keep_every: int | None = None
) -> Iterator[Checkpoints]:
    """The checkpoints in a folder, which is made; on leaving, what was begun is finished.

    Args:
        folder: for the checkpoints alone.
        keep_last: how many of the newest are kept.
        keep_every: those of steps that this divides are kept too; None keeps no others.
    """
    policies: list[Any] = [LatestN(keep_last)]
    if keep_every is not None:
        policies.append(EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(policies),
        create=True,
        cleanup_tmp_directories=True,
    )
    with _quiet_orbax():
        manager = ocp.CheckpointManager(folder.absolute(), options=options)
        try:
            yield Checkpoints(folder, manager)
        finally:
            # An error of the last save was raised by `finish`, or another is on its way already.
            with contextlib.suppress(Exception):
                manager.close()


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps the tracebacks of Orbax's threads off the terminal: `_explained` says it in a line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _one_line(error: Exception) -> str:
    """An error's text without line breaks, and of tensorstore's only what the system said."""
    text = " ".join(str(error).split()) or type(error).__name__
    found = re.search(r'": ([^"]*\[os_error_code=\'\d+\'\])', text)
    text = found[1] if found else text
    return text if len(text) < 300 else text[:300] + "..."
