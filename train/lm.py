"""`kvjax train lm`: trains a small decoder that answers questions about a document.

What is learnt is the answers alone: the loss looks at the tokens that follow the opening of an
answer. Documents grow in stages, since finding a value is learnt soonest where there are few.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx

from kvjax.errors import InputError
from kvjax.models.attention import causal_attend
from kvjax.models.decoder import Decoder
from kvjax.models.hf import save
from kvjax.models.hf_config import config_fields
from kvjax.models.tokenizer import Tokenizer
from kvjax.train.chat import PAD, save_tokenizer, train_tokenizer
from kvjax.train.data import step_dataset
from kvjax.train.flops import decoder_step_flops
from kvjax.train.lm_config import LMConfig, read_config
from kvjax.train.loop import run
from kvjax.train.losses import cross_entropy, output_kernel
from kvjax.train.metrics import Work
from kvjax.train.optimizers import muon_cosine
from kvjax.train.program import run_main, settle, show_result, train_options
from kvjax.train.remat import layer_remat
from kvjax.train.step import Loss, Sums, init_state, make_mesh, make_step
from kvjax.train.tasks import Mixture
from kvjax.train.tasks.encode import ChatEncoder, stretch

__all__ = [
    "Batch",
    "answer_loss",
    "encode_batch",
    "exact_match_rate",
    "first_decoder",
    "main",
    "make_batches",
    "make_optimizer",
    "train",
]

Array = jax.Array
_EVAL_ROWS = 16
_ABOUT = """Train a small language model that answers questions about a document.

Run the same command again after an interruption: it goes on from its last checkpoint."""


class Batch(NamedTuple):
    """Examples of one step.

    Attributes:
        tokens: int32[B, T], padded at the end.
        positions: int32[B, T], which the rotary angles follow.
        places: int32[B, A], from which positions an answer's tokens are predicted.
        weights: float32[B, A], 1 where `places` holds such a position, 0 where it pads.
        window: int32 scalar, how many of the last positions the first layer sees, or None: all.
            None is faster, since then no mask is needed.
    """

    tokens: np.ndarray
    positions: np.ndarray
    places: np.ndarray
    weights: np.ndarray
    window: np.ndarray | None


def encode_batch(
    encoder: ChatEncoder,
    seed: int,
    first: int,
    size: int,
    length: int,
    difficulty: Mixture,
    window: int = 0,
    longest: int = 0,
) -> Batch:
    """The examples `first` to `first + size - 1` of a seed.

    Args:
        encoder: makes the ids.
        seed: of the data.
        first: the number of the first example.
        size: how many.
        length: to which they are padded.
        difficulty: makes them.
        window: of the first layer; 0 is none.
        longest: positions are stretched to up to this many, see `stretch`.
    """
    answers = difficulty.answer_tokens
    batch = Batch(
        np.full((size, length), encoder.tokenizer.backend.token_to_id(PAD), np.int32),
        np.broadcast_to(np.arange(length, dtype=np.int32), (size, length)).copy(),
        np.zeros((size, answers), np.int32),
        np.zeros((size, answers), np.float32),
        np.asarray(window, np.int32) if window else None,
    )
    for row in range(size):
        chat = difficulty.make(seed, first + row).messages()
        ids = encoder.encode(chat)
        if ids.size > length:
            raise InputError(
                f"a document of {len(chat) // 2} questions has {ids.size} tokens, more than its "
                f"stage's {length}: make the stage longer or the documents shorter"
            )
        places = encoder.answer_places(ids)
        batch.tokens[row, : ids.size] = ids
        batch.places[row, : places.size] = places
        batch.weights[row, : places.size] = 1
        # A seed of its own, so that documents are the same with and without gaps.
        rng = np.random.default_rng(np.random.SeedSequence((seed, first + row, 1)))
        batch.positions[row, : ids.size] = stretch(rng, ids.size, encoder.stops(ids), longest)
    return batch


def _answers(
    decoder: Decoder, batch: Batch, remat: str = "none", unroll: bool = False
) -> tuple[Array, Array]:
    """Hidden states [B, A, E] from which the answers' tokens are predicted, and int32[B, A] those.

    The output layer is the costlier the more tokens there are; only answers pay for it.
    """
    windows = decoder.config.layer_windows()
    if batch.window is not None:
        windows = jnp.zeros(decoder.config.num_layers, jnp.int32) if windows is None else windows
        windows = windows.at[0].set(batch.window)
    attend = causal_attend(windows)
    wrap = layer_remat(remat, unrolled=unroll)
    tokens, positions = jnp.asarray(batch.tokens), jnp.asarray(batch.positions)
    hidden, _ = decoder(tokens, positions, (), attend, remat=wrap, unroll=unroll)
    hidden = jnp.take_along_axis(hidden, batch.places[..., None], axis=1)
    return hidden, jnp.take_along_axis(tokens, batch.places + 1, axis=1)


def answer_loss(graph: nnx.GraphDef[Any], *, remat: str = "none", unroll: bool = False) -> Loss:
    """The cross-entropy of the answers' tokens, in nats; the metric is `accuracy`, of tokens."""

    def loss(params: nnx.State[Any, Any], batch: Batch) -> Sums:
        decoder = nnx.merge(graph, params)
        hidden, targets = _answers(decoder, batch, remat, unroll)
        kernel = output_kernel(decoder, hidden.dtype)
        weights = jnp.asarray(batch.weights)
        nats, right = cross_entropy(hidden, kernel, targets, weights)
        return Sums(nats, jnp.sum(weights), {"accuracy": right})

    return loss


def exact_match_rate(
    graph: nnx.GraphDef[Any], params: nnx.State[Any, Any], tokenizer: Tokenizer, config: LMConfig
) -> float:
    """The share of fresh questions, one a document, whose whole answer greedy decoding gets right.

    Greedy decoding writes an answer exactly if and only if each of its tokens is the likeliest
    after the true ones before it; so one pass over the true answers decides.
    """

    @jax.jit
    def right(params: nnx.State[Any, Any], batch: Batch) -> Array:
        decoder = nnx.merge(graph, params)
        hidden, targets = _answers(decoder, batch)
        found = jnp.argmax(decoder.logits(hidden), axis=-1)
        return jnp.all((found == targets) | (batch.weights == 0), axis=-1)

    difficulty = config.eval_difficulty.alone()
    count, longest = config.eval_prompts, config.model.max_positions
    whole = encode_batch(ChatEncoder(tokenizer), config.eval_seed, 0, count, longest, difficulty)
    used = int(np.max(whole.places)) + 2
    rows = (slice(first, first + _EVAL_ROWS) for first in range(0, count, _EVAL_ROWS))
    hits = [
        right(
            params,
            whole._replace(
                tokens=whole.tokens[r, :used],
                positions=whole.positions[r, :used],
                places=whole.places[r],
                weights=whole.weights[r],
            ),
        )
        for r in rows
    ]
    return float(np.mean(np.concatenate(hits)))


def make_batches(config: LMConfig, tokenizer: Tokenizer) -> Callable[[int], Batch]:
    """The batch of each step by its number; no example comes twice in a run."""
    shares = np.cumsum([stage.share for stage in config.stages])
    ends = np.rint(shares * config.steps).astype(int)
    counts = np.diff(ends, prepend=0) * [stage.batch_size for stage in config.stages]
    firsts = np.cumsum(counts) - counts
    encoder = ChatEncoder(tokenizer)

    def batch(step: int) -> Batch:
        index = int(np.searchsorted(ends, step, side="right"))
        stage = config.stages[index]
        into = step - int(ends[index - 1] if index else 0)
        first = int(firsts[index]) + into * stage.batch_size
        size, length = stage.batch_size, stage.length
        return encode_batch(
            encoder, config.seed, first, size, length, stage.difficulty, stage.first_window,
            stage.longest,
        )  # fmt: skip

    return batch


def make_optimizer(config: LMConfig) -> optax.GradientTransformation:
    """Muon for the kernels and Adam for the rest, see `muon_cosine`."""
    return muon_cosine(
        _matrices,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        steps=config.steps,
        adam_b2=config.adam_b2,
    )


def _matrices(params: Any) -> Any:
    """Which axes of each kernel are a matrix's rows and columns; None for all other parameters."""

    def axes(path: tuple, x: Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = jax.tree_util.keystr(path)
        if "kernel" not in names:
            return None
        inputs = 2 if "out" in names else 1  # after the layers' axis: heads and their size, or one
        numbers = tuple(range(1, x.ndim))
        return optax.contrib.MuonDimensionNumbers(numbers[:inputs], numbers[inputs:])

    return jax.tree_util.tree_map_with_path(axes, params)


def first_decoder(config: LMConfig) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]:
    """A fresh decoder, split, whose layers add little to the stream at first.

    With tied embeddings the stream starts small, and layers at full size would drown the tokens.
    """
    graph, params = nnx.split(Decoder(config.model, rngs=nnx.Rngs(config.seed)))

    def damp(path: tuple, x: Array) -> Array:
        names = jax.tree_util.keystr(path)
        return 0.1 * x if "kernel" in names and ("out" in names or "down" in names) else x

    return graph, jax.tree_util.tree_map_with_path(damp, params)


def train(config: LMConfig, folder: Path) -> dict[str, Any]:
    """Trains or resumes, measures, writes `folder`/model; returns the run's figures."""
    config_fields(config.model)  # what cannot be exported is refused now, not after the training
    tokenizer = train_tokenizer(Mixture.corpus(), config.model.vocab_size)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"model.vocab_size is {config.model.vocab_size}, less than the tokenizer's "
            f"{tokenizer.vocab_size}: give that or more"
        )
    machine = config.machine
    mesh = make_mesh(machine.data, machine.fsdp, machine.model)
    settle(folder, config)
    graph, params = first_decoder(config)
    optimizer = make_optimizer(config)
    start = time.perf_counter()
    state = init_state(params, optimizer, mesh=mesh, ema=config.step.ema_decay is not None)
    loss = answer_loss(graph, remat=config.remat, unroll=config.unroll)
    state = run(
        make_step(loss, optimizer, config.step, like=state),
        state,
        step_dataset(make_batches(config, tokenizer), config.steps, workers=machine.workers),
        steps=config.steps, folder=folder,
        save_every=config.save_every, log_every=config.log_every,
        keep_last=machine.keep_last, keep_every=machine.keep_every,
        work=functools.partial(_work, config), tensorboard=machine.tensorboard,
    )  # fmt: skip
    seconds, params = time.perf_counter() - start, state.best_params
    save(folder / "model", config.model, params, dtype="float32")
    save_tokenizer(folder / "model", tokenizer, max_positions=config.model.max_positions)
    return {
        "steps": int(state.step),
        "seconds": round(seconds, 1),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "exact_match": exact_match_rate(graph, params, tokenizer, config),
        "eval_prompts": config.eval_prompts,
        "model": str(folder / "model"),
    }


def _work(config: LMConfig, batch: Batch) -> Work:
    rows, length = batch.tokens.shape
    flops = decoder_step_flops(config.model, rows, length, batch.places.shape[1])
    return Work(batch.tokens.size, flops)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = train_options(argv, "lm", "lm_tiny", read_config, _ABOUT)
    result = train(options.fields, options.out)
    line = (
        f"{result['steps']} steps; {result['exact_match']:.1%} of {result['eval_prompts']} "
        f"fresh questions answered right; the model is in {result['model']}"
    )
    return show_result(result, line, options.json)


if __name__ == "__main__":
    # By its own name, not as __main__: the processes that make batches import it again.
    from kvjax.train import lm

    run_main(lm.main)
