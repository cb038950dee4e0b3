"""What a run says while it goes: lines of metrics, speed, TensorBoard, and a progress bar.

`metrics.jsonl` holds what follows from the run's settings alone, so that a run which was killed and
resumed writes the same bytes as an unbroken one. What depends on the machine, time and speed, goes
to `speed.jsonl`.
"""

import collections
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from kvjax.errors import InputError

__all__ = ["MetricsLog", "Work", "open_tensorboard"]


class Work(NamedTuple):
    """What a batch is: tokens, and the FLOPs of a step on it (0 where nobody counted)."""

    tokens: int
    flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """A step whose numbers the device may still owe."""

    step: int
    metrics: Mapping[str, jax.Array]
    work: Work


class MetricsLog:
    """Collects the metrics of each step, and writes their means every so many steps."""

    def __init__(
        self,
        folder: Path,
        *,
        first: int,
        steps: int,
        log_every: int,
        pending: Mapping[str, list[float]],
        peak_flops: float | None = None,
        tensorboard: Any = None,
        kept: Callable[[], str] = lambda: "no checkpoint was written",
    ) -> None:
        """Opens the log of a run, without what steps after `first` left there before.

        Args:
            folder: of the run.
            first: how many steps were taken.
            steps: how many there will be.
            log_every: steps between lines; the last step has one too.
            pending: from the checkpoint that the run goes on from.
            peak_flops: FLOP/s of all devices together, for the utilisation.
            tensorboard: a writer with `add_scalar`, or None.
            kept: says which checkpoint is left where training cannot go on.
        """
        self._steps, self._log_every, self._peak, self._kept = steps, log_every, peak_flops, kept
        self._files = {name: folder / f"{name}.jsonl" for name in ("metrics", "speed")}
        self._tensorboard = tensorboard
        self._values = collections.defaultdict(list, {k: list(v) for k, v in pending.items()})
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._clock: float | None = None  # None until a step is over: the first one compiles
        self._since, self._shown_speed = Work(0), {}
        self._bar = tqdm(initial=first, total=steps, unit="step", disable=None, dynamic_ncols=True)
        for path in self._files.values():
            _drop_lines_after(path, first)

    def add(self, step: int, metrics: Mapping[str, jax.Array], work: Work) -> None:
        """Notes step number `step` (from 1), and reads the numbers of the step before it.

        One step late, so that the device has its next step before the host looks at the last one.

        Raises:
            InputError: the loss or its gradient is not finite.
        """
        self._queue.append(_Waiting(step, metrics, work))
        while len(self._queue) > 1:
            self._settle(self._queue.popleft())

    def flush(self) -> None:
        """Reads the numbers of every step that was noted; raises as `add` does."""
        while self._queue:
            self._settle(self._queue.popleft())

    def pending(self) -> dict[str, list[float]]:
        """The numbers that no line holds yet, for the checkpoint; `flush` before."""
        return {name: list(values) for name, values in self._values.items()}

    def close(self) -> None:
        """Ends the progress bar and TensorBoard's file."""
        self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _settle(self, waiting: _Waiting) -> None:
        numbers = {name: float(value) for name, value in waiting.metrics.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(numbers.get(name, 0.0)):
                raise InputError(
                    f"{name} is {numbers[name]} at step {waiting.step}; {self._kept()}: lower the "
                    "learning rate or clip the gradient, and train into another folder"
                )
        for name, number in numbers.items():
            self._values[name].append(number)
        self._count(waiting.work)
        if waiting.step % self._log_every == 0 or waiting.step == self._steps:
            self._write(waiting.step)
        self._show(numbers)

    def _count(self, work: Work) -> None:
        if self._clock is None:
            self._clock = time.perf_counter()
        else:
            since = self._since
            self._since = Work(since.tokens + work.tokens, since.flops + work.flops)

    def _speed(self) -> dict[str, float]:
        seconds = time.perf_counter() - (self._clock or 0.0)
        if not self._since.tokens or seconds <= 0:
            return {}
        row: dict[str, float] = {"tokens_per_second": round(self._since.tokens / seconds)}
        if self._peak and self._since.flops:
            row |= {"mfu": round(self._since.flops / seconds / self._peak, 4)}
        return row

    def _write(self, step: int) -> None:
        means = {name: math.fsum(v) / len(v) for name, v in sorted(self._values.items())}
        self._values.clear()
        speed = {"unix_time": round(time.time(), 3), **self._speed()}
        self._clock, self._since, self._shown_speed = time.perf_counter(), Work(0), speed
        for name, row in (("metrics", means), ("speed", speed)):
            with self._files[name].open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")
        if self._tensorboard is not None:
            for name, number in {**means, **speed}.items():
                self._tensorboard.add_scalar(name, number, step)

    def _show(self, numbers: Mapping[str, float]) -> None:
        if self._bar.disable:
            return
        shown = {"loss": f"{numbers['loss']:.4g}"} if "loss" in numbers else {}
        speed = self._speed() or self._shown_speed
        if "tokens_per_second" in speed:
            shown["tokens/s"] = tqdm.format_sizeof(speed["tokens_per_second"])
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()


def _drop_lines_after(path: Path, first: int) -> None:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    # What follows the last line break is what a killed run did not finish.
    lines = text.splitlines()[: text.count("\n")]
    kept = [line for line in lines if json.loads(line)["step"] <= first]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def open_tensorboard(folder: Path, first: int) -> Any:
    """A writer of TensorBoard's files that forgets what steps after `first` wrote before.

    Raises:
        InputError: tensorboardX is not installed.
    """
    try:
        import tensorboardX  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "TensorBoard's files need tensorboardX: install 'kvjax[tensorboard]', or train without"
        ) from None
    return tensorboardX.SummaryWriter(str(folder), purge_step=first + 1)
