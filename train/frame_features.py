"""`kvjax train frame_features`: trains the networks that judge generated moving digits.

What they are, and what for, says `kvjax.models.frame_features`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kvjax.errors import InputError
from kvjax.models.frame_features import (
    CLIP_FRAMES,
    ClipFeatures,
    DigitClassifier,
    crop_digits,
)
from kvjax.models.weights import save_weights
from kvjax.moving_digits import DigitImages, MovingDigits, Scene, load_digit_images
from kvjax.train.data import step_dataset
from kvjax.train.lm_config import Machine
from kvjax.train.loop import run
from kvjax.train.program import named_config, run_main, settle, show_result, train_options
from kvjax.train.step import Loss, StepOptions, Sums, init_state, make_mesh, make_step
from kvjax.video_files import to_unit

__all__ = ["Examples", "FrameFeaturesConfig", "main", "make_examples", "network_loss", "train"]

Array = jax.Array
_ABOUT = """Train a network that judges videos of moving digits.

Run the same command again after an interruption: it goes on from its last checkpoint."""
_SPREAD = 8  # crops of a scene: making it is the costly part


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameFeaturesConfig:
    """A training run of `kvjax train frame_features`.

    Attributes:
        network: "digits", a classifier of crops, or "clips", features of 16 frames.
        steps: how many.
        batch_size: examples a step.
        digits: how they move; two of them for "clips".
        noise: standard deviation of what is added to pixels between -1 and 1, since generated
            frames are not quite clean.
        learning_rate: the highest; after a warm-up a cosine takes it to 0.
        step: how a step computes.
        machine: what of the machine is used.
        seed: of the data and of the first parameters.
        eval_seed: of the examples on which the result is measured, with digits of the test split.
        eval_batches: how many batches of them.
        save_every: steps between checkpoints.
        log_every: steps between lines of metrics.
    """

    network: str
    steps: int
    batch_size: int
    digits: MovingDigits = dataclasses.field(default_factory=MovingDigits)
    noise: float = 0.1
    learning_rate: float = 2e-3
    step: StepOptions = dataclasses.field(
        default_factory=lambda: StepOptions(clip_norm=1.0, ema_decay=0.99)
    )
    machine: Machine = dataclasses.field(default_factory=Machine)
    seed: int = 0
    eval_seed: int = 1_000_000
    eval_batches: int = 8
    save_every: int = 500
    log_every: int = 50

    def __post_init__(self) -> None:
        if self.network not in ("digits", "clips"):
            raise InputError(f"network is {self.network!r}: use digits or clips")
        for name in ("steps", "batch_size", "eval_batches", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.network == "clips" and self.digits.digits != 2:
            raise InputError(f"clips have two digits, not {self.digits.digits}")
        self.step.check()


class Examples(NamedTuple):
    """A batch.

    Attributes:
        pixels: uint8, crops [B, 16, 16, 1] or clips [B, 16, 32, 32, 1].
        labels: int32[B] of the digit, or [B, N] of the digits that move.
        speeds: float32[B, 4], see `ClipFeatures`, or None.
        seed: uint32[B], of the noise that is added.
    """

    pixels: np.ndarray
    labels: np.ndarray
    speeds: np.ndarray | None
    seed: np.ndarray


def make_examples(
    config: FrameFeaturesConfig, images: DigitImages, seed: int
) -> Callable[[int], Examples]:
    """The batch of each step by its number."""

    def batch(step: int) -> Examples:
        rng = np.random.default_rng(np.random.SeedSequence((seed, step, 2)))
        make = _crops if config.network == "digits" else _clips
        pixels, labels, speeds = make(config, images, seed, step, rng)
        return Examples(pixels, labels, speeds, rng.integers(2**32, size=len(pixels), dtype="u4"))

    return batch


def _scene(
    config: FrameFeaturesConfig, images: DigitImages, seed: int, number: int, frames: int
) -> Scene:
    return config.digits.scene(images, seed, number, frames)


def _clips(
    config: FrameFeaturesConfig, images: DigitImages, seed: int, step: int, _: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = range(step * config.batch_size, (step + 1) * config.batch_size)
    scenes = [_scene(config, images, seed, row, CLIP_FRAMES) for row in rows]
    speeds = [np.sort(np.abs(scene.velocity), axis=0).T.reshape(-1) for scene in scenes]
    pixels = np.stack([config.digits.frames(scene) for scene in scenes])
    return pixels, np.stack([s.labels for s in scenes]), np.asarray(speeds, np.float32)


def _crops(
    config: FrameFeaturesConfig, images: DigitImages, seed: int, step: int, rng: Any
) -> tuple[np.ndarray, np.ndarray, None]:
    """Crops of every digit that no other touches, some a little beside it."""
    pixels, labels, number = [], [], step * config.batch_size
    while len(labels) < config.batch_size:
        scene = _scene(config, images, seed, number, _SPREAD)
        number += 1
        gaps = np.abs(scene.corners[:, :, None] - scene.corners[:, None]).max(axis=-1)
        apart = (gaps + 1e9 * np.eye(config.digits.digits)).min(axis=-1) >= config.digits.digit_size
        beside = scene.corners + rng.uniform(-2, 2, scene.corners.shape)
        frames = config.digits.frames(scene).astype(np.float32) * (2 / 255) - 1
        found = crop_digits(frames, beside, config.digits.digit_size)[apart]
        pixels.extend(np.rint((found + 1) * 127.5).astype(np.uint8))
        labels.extend(np.broadcast_to(scene.labels, apart.shape)[apart])
    size = config.batch_size
    return np.stack(pixels[:size]), np.asarray(labels[:size], np.int32), None


def network_loss(graph: nnx.GraphDef[Any], config: FrameFeaturesConfig) -> Loss:
    """Cross-entropies, and for clips the squared error of the speeds; the metric is `accuracy`."""

    def loss(params: nnx.State[Any, Any], batch: Examples) -> Sums:
        network, labels = nnx.merge(graph, params), jnp.asarray(batch.labels)
        pixels = to_unit(jnp.asarray(batch.pixels))
        keys = jax.vmap(jax.random.key)(jnp.asarray(batch.seed))
        pixels += config.noise * jax.vmap(lambda key: jax.random.normal(key, pixels.shape[1:]))(
            keys
        )
        rows = jnp.float32(len(pixels))
        if config.network == "digits":
            scores = network(pixels)
            nats = optax.losses.softmax_cross_entropy_with_integer_labels(scores, labels)
            right = jnp.argmax(scores, axis=-1) == labels
            return Sums(jnp.sum(nats), rows, {"accuracy": jnp.sum(right.astype(jnp.float32))})
        scores, speeds = network.digits_and_motion(pixels)
        there = jnp.max(jax.nn.one_hot(labels, 10), axis=1)
        nats = jnp.sum(optax.losses.sigmoid_binary_cross_entropy(scores, there), axis=-1)
        error = jnp.sum((speeds - batch.speeds) ** 2, axis=-1)
        right = jnp.mean(((scores > 0) == (there > 0.5)).astype(jnp.float32), axis=-1)
        metrics = {"accuracy": jnp.sum(right), "speed_error": jnp.sum(error) / 4}
        return Sums(jnp.sum(nats + error), rows, metrics)

    return loss


def train(config: FrameFeaturesConfig, folder: Path) -> dict[str, Any]:
    """Trains or resumes, measures, writes `folder`/model.safetensors; returns the figures."""
    machine = config.machine
    mesh = make_mesh(machine.data, machine.fsdp, machine.model)
    settle(folder, config)
    made = DigitClassifier if config.network == "digits" else ClipFeatures
    graph, params = nnx.split(made(rngs=nnx.Rngs(config.seed)))
    schedule = optax.schedules.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, config.steps // 20), config.steps
    )
    optimizer, start = optax.adamw(schedule), time.perf_counter()
    state = init_state(params, optimizer, mesh=mesh, ema=config.step.ema_decay is not None)
    loss = network_loss(graph, config)
    batches = make_examples(config, load_digit_images(), config.seed)
    state = run(
        make_step(loss, optimizer, config.step, like=state), state,
        step_dataset(batches, config.steps, workers=machine.workers), steps=config.steps,
        folder=folder, save_every=config.save_every, log_every=config.log_every,
        keep_last=machine.keep_last, keep_every=machine.keep_every,
        tensorboard=machine.tensorboard,
    )  # fmt: skip
    save_weights(folder / "model.safetensors", state.best_params)
    return {
        "steps": int(state.step),
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        **_evaluate(loss, state.best_params, config),
        "model": str(folder / "model.safetensors"),
    }


def _evaluate(loss: Loss, params: Any, config: FrameFeaturesConfig) -> dict[str, float]:
    """The metrics on digits that training has not seen."""
    batches = make_examples(config, load_digit_images("test"), config.eval_seed)
    jitted = jax.jit(loss)
    sums = [jitted(params, batches(number)) for number in range(config.eval_batches)]
    total: Any = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), sums)
    return {name: round(float(x / total.weight), 4) for name, x in total.metrics.items()}


def read_config(name: str) -> FrameFeaturesConfig:
    """The config of `kvjax.configs` with this name; InputError lists those there are."""
    return named_config(name, "frame_features", "frame_")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = train_options(argv, "frame_features", "frame_digits", read_config, _ABOUT)
    result = train(options.fields, options.out)
    line = f"{result['steps']} steps; accuracy {result['accuracy']:.1%}; {result['model']}"
    return show_result(result, line, options.json)


if __name__ == "__main__":
    # By its own name, not as __main__: the processes that make batches import it again.
    from kvjax.train import frame_features

    run_main(frame_features.main)
