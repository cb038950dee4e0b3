"""`kvjax train task-classifier`: teaches a few parameters to tell the two kinds of tasks apart.

Localization is to find what stands somewhere in a prompt, aggregation to gather it from everywhere.
The result is measured on fresh prompts, and, by a second classifier that never saw some of the
tasks, on prompts of a form that was not trained on.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from kvjax.errors import InputError
from kvjax.models.task_classifier import TaskClassifier, ends
from kvjax.models.tokenizer import Tokenizer
from kvjax.models.weights import save_weights
from kvjax.train.program import show_result
from kvjax.train.tasks import AGGREGATION, TASKS, Mixture, Setting
from kvjax.train.tasks.encode import ChatEncoder

__all__ = ["Options", "main", "make_data", "train"]

Data = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Train the classifier of localization and aggregation tasks; under a minute on two cores."""

    model: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder of the model whose tokenizer it reads with."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Where its weights go, such as runs/task_classifier.safetensors."""
    held_out: tuple[str, ...] = ("multi_query", "mixed")
    """Tasks that the second classifier does not see, and is measured on."""
    prompts: int = 100
    """Of each task and length, to learn from; as many others to measure on."""
    lengths: tuple[int, ...] = (160, 512, 1024)
    """Tokens of a prompt."""
    dim: int = 8
    """Size of the embeddings."""
    steps: int = 200
    """Of training, each on all prompts."""
    learning_rate: float = 0.03
    """Of Adam."""
    seed: int = 5_000_000
    """Of the documents and of the first parameters."""
    json: bool = False
    """Print nothing but one JSON object."""


def make_data(tokenizer: Tokenizer, tasks: Sequence[str], options: Options, seed: int) -> Data:
    """Prompts without their answers: tokens int32[n, T], used bool[n, T], classes int32[n]."""
    encoder = ChatEncoder(tokenizer)
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    classes: list[int] = []
    for task in tasks:
        for length in options.lengths:
            mixture = Mixture(tasks=(task,), setting=Setting(tokens=length)).alone()
            for number in range(options.prompts):
                chat = mixture.make(seed, number).messages()[:-1]
                rows.append(ends(encoder.encode(chat)))
                classes.append(int(task in AGGREGATION))
    tokens, used = (np.stack(column) for column in zip(*rows, strict=True))
    return tokens, used, np.asarray(classes, np.int32)


def train(tokenizer: Tokenizer, tasks: Sequence[str], options: Options) -> TaskClassifier:
    """A classifier that has seen these tasks."""
    tokens, used, classes = map(jnp.asarray, make_data(tokenizer, tasks, options, options.seed))
    model = TaskClassifier(tokenizer.vocab_size, options.dim, rngs=nnx.Rngs(options.seed))
    graph, params = nnx.split(model)
    optimizer = optax.adam(options.learning_rate)

    def loss(params: Any) -> jax.Array:
        logits = nnx.merge(graph, params)(tokens, used)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, classes))

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        gradient = jax.grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole powers
            updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(options.steps):
        params, state = step(params, state)
    return nnx.merge(graph, params)


def accuracy(
    model: TaskClassifier, tokenizer: Tokenizer, tasks: Sequence[str], options: Options
) -> float:
    """The share of fresh prompts that are told right."""
    tokens, used, classes = make_data(tokenizer, tasks, options, options.seed + 1)
    found = jnp.argmax(model(jnp.asarray(tokens), jnp.asarray(used)), axis=-1)
    return float(np.mean(np.asarray(found) == classes))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = tyro.cli(Options, prog="kvjax train task-classifier", args=argv)
    if unknown := set(options.held_out) - set(TASKS):
        raise InputError(f"no tasks {', '.join(unknown)}: use some of {', '.join(TASKS)}")
    tokenizer = Tokenizer.load(options.model)
    model = train(tokenizer, tuple(TASKS), options)
    save_weights(options.out, nnx.split(model)[1])
    seen = [task for task in TASKS if task not in options.held_out]
    second = train(tokenizer, seen, options)
    figures = {
        "accuracy": accuracy(model, tokenizer, tuple(TASKS), options),
        "accuracy_held_out": accuracy(second, tokenizer, options.held_out, options),
        "held_out": list(options.held_out),
        "weights": str(options.out),
    }
    line = (
        f"{100 * figures['accuracy']:.1f} % of fresh prompts told right; of tasks never seen "
        f"{100 * figures['accuracy_held_out']:.1f} %. See {options.out}"
    )
    return show_result(figures, line, options.json)


if __name__ == "__main__":
    sys.exit(main())
