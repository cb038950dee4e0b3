"""How well a model does the tasks: `python -m kvjax.train.tasks.evaluate FOLDER` prints it as JSON.

Every prompt has a fresh document and one question, and fills the length that is asked for. The
whole cache is there: this says what a model can do before anything is taken away from it.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from kvjax.errors import InputError
from kvjax.models.attention import causal_attend
from kvjax.models.hf import load
from kvjax.models.tokenizer import Tokenizer
from kvjax.train.tasks.encode import ChatEncoder
from kvjax.train.tasks.example import Setting
from kvjax.train.tasks.mixture import TASKS, Mixture

__all__ = ["Options", "evaluate", "main"]

Array = jax.Array
Right = Callable[..., Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the share of questions that a model answers exactly, for each task and length."""

    model: tyro.conf.Positional[Path]
    """Folder of the model, such as runs/lm_tiny/model."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which tasks."""
    lengths: tuple[int, ...] = (1024, 2048)
    """Tokens that a prompt and its answer fill."""
    prompts: int = 1000
    """How many of each task and length."""
    seed: int = 3_000_000
    """Of the documents; training and the demo have other ones."""
    rows: int = 16
    """How many are computed at a time."""


def evaluate(options: Options) -> dict[str, Any]:
    """The shares, by length and task.

    Greedy decoding writes an answer exactly if and only if each of its tokens, the end included, is
    the likeliest after the true ones before it; so one pass over the true answers decides.
    """
    graph, params, _ = load(options.model)
    encoder = ChatEncoder(Tokenizer.load(options.model))
    right, start = _make_right(graph), time.perf_counter()
    shares: dict[str, dict[str, float]] = {}
    for length in options.lengths:
        shares[str(length)] = of_length = {}
        for task in options.tasks:
            mixture = Mixture(tasks=(task,), setting=Setting(tokens=length)).alone()
            hits = 0
            for first in range(0, options.prompts, options.rows):
                rows = min(options.rows, options.prompts - first)
                batch = _encode(encoder, mixture, options, first, length)
                hits += int(np.sum(np.asarray(right(params, *batch))[:rows]))
            of_length[task] = hits / options.prompts
            print(f"{length} {task}: {of_length[task]:.3f}", file=sys.stderr, flush=True)
    return {
        "model": str(options.model),
        "prompts": options.prompts,
        "seconds": round(time.perf_counter() - start, 1),
        "exact_match": shares,
    }


def _make_right(graph: nnx.GraphDef[Any]) -> Right:
    @jax.jit
    def right(params: Any, tokens: Array, places: Array, weights: Array) -> Array:
        """Whether each row's answer is written: bool[B]."""
        decoder = nnx.merge(graph, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        attend = causal_attend(decoder.config.layer_windows())
        hidden, _ = decoder(tokens, positions, (), attend)
        hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
        targets = jnp.take_along_axis(tokens, places + 1, axis=1)
        found = jnp.argmax(decoder.logits(hidden), axis=-1)
        return jnp.all((found == targets) | ~weights, axis=-1)

    return right


def _encode(
    encoder: ChatEncoder, mixture: Mixture, options: Options, first: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples from number `first` on: tokens int32[B, T], places int32[B, A], weights bool."""
    tokens = np.zeros((options.rows, length), np.int32)
    places = np.zeros((options.rows, mixture.answer_tokens), np.int32)
    weights = np.zeros(places.shape, bool)
    for row in range(options.rows):
        ids = encoder.encode(mixture.make(options.seed, first + row).messages())
        at = encoder.answer_places(ids)
        tokens[row, : ids.size], places[row, : at.size], weights[row, : at.size] = ids, at, True
    return tokens, places, weights


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    print(
        json.dumps(evaluate(tyro.cli(Options, prog="kvjax.train.tasks.evaluate", args=arguments)))
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as _error:
        print(f"kvjax: error: {_error}", file=sys.stderr)
        sys.exit(2)
