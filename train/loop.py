"""The training loop that every program here shares: a pure step, checkpoints, metrics, progress.

The step is a jitted function of the state and a batch, and the batch a function of the step's
number. So a run that was killed goes on from its last checkpoint as if nothing had happened: same
data, same numbers, bit for bit.
"""

import collections
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

__all__ = ["Loss", "Step", "TrainState", "init_state", "make_step", "run"]

Array = jax.Array
Metrics = Mapping[str, Array]
Loss = Callable[[Any, Any], tuple[Array, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
        step: int32 scalar, how many steps were taken.
        params: the parameters, any pytree.
        opt_state: the optimizer's.
    """

    step: Array
    params: Any
    opt_state: Any


Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def make_step(loss: Loss, optimizer: optax.GradientTransformation) -> Step:
    """A jitted step `(state, batch) -> (state, metrics)`; the state that goes in is donated.

    Args:
        loss: `(params, batch) -> (scalar, metrics)`, pure; metrics are scalars by name.
        optimizer: the optax transformation, schedule and clipping included.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = gradient(state.params, batch)
        # optax mixes counts with floats: strict promotion is for our own arithmetic.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            norm = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state), {
            "loss": value,
            "grad_norm": norm,
            **metrics,
        }

    return step


def run(
    step: Step,
    state: TrainState,
    batches: Callable[[int], Any],
    *,
    steps: int,
    folder: Path,
    save_every: int,
    log_every: int,
) -> TrainState:
    """Takes steps until there are `steps` of them, from the folder's last checkpoint if it has one.

    Writes `folder`/checkpoints and `folder`/metrics.jsonl: one object every `log_every` steps with
    the step, the seconds since this call, and the means of the metrics since the last line.

    Args:
        step: from `make_step`.
        state: where training starts; donated.
        batches: the batch of a step, by its number from 0; a pure function.
        steps: how many steps in all.
        folder: of the run; made where it does not exist.
        save_every: steps between checkpoints; the last step makes one too.
        log_every: steps between lines of metrics.
    """
    with _checkpoints(folder) as manager:
        state = _restore(manager, state)
        first = int(state.step)
        log = _MetricsLog(folder / "metrics.jsonl", first)
        bar = tqdm(range(first, steps), initial=first, total=steps, unit="step", disable=None)
        for number in bar:
            state, metrics = step(state, batches(number))
            done = number + 1
            log.add(metrics)
            if done % log_every == 0 or done == steps:
                log.write(done)
            if done % save_every == 0 or done == steps:
                manager.save(done, args=ocp.args.StandardSave(state))
    return state


def _checkpoints(folder: Path) -> ocp.CheckpointManager:
    # Not asynchronous: on the CPU a save in the background would read the buffers that the next
    # step, to which they are donated, writes.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, create=True, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def _restore(manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
    last = manager.latest_step()
    if last is None:
        return state
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    restored: Any = manager.restore(last, args=ocp.args.StandardRestore(like))
    return restored


class _MetricsLog:
    """Lines of metrics in a file, without those that steps after `first` left there before."""

    def __init__(self, path: Path, first: int) -> None:
        self.path, self.start = path, time.perf_counter()
        self.waiting: dict[str, list[Array]] = collections.defaultdict(list)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # What follows the last line break is what a killed run did not finish.
        lines = text.splitlines()[: text.count("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= first]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def add(self, metrics: Metrics) -> None:
        """Keeps a step's metrics, without waiting for the device."""
        for name, value in metrics.items():
            self.waiting[name].append(value)

    def write(self, step: int) -> None:
        """Writes a line with the means of what was kept."""
        means = {name: sum(map(float, v)) / len(v) for name, v in self.waiting.items()}
        self.waiting.clear()
        row = {"step": step, "seconds": round(time.perf_counter() - self.start, 3), **means}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
