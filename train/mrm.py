"""`kvjax train mrm`: teaches a decoder to rate every token that could follow a text.

Each token of a text supervises exactly one entry of one vector: of the rewards foretold after the
tokens before it, its own (Saffron-1, arXiv 2506.06444, section 4.2). Since the decoder is causal,
one pass over a text does that for all of its tokens.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kvjax.errors import InputError
from kvjax.models import hf
from kvjax.models.attention import causal_attend
from kvjax.models.decoder import Decoder
from kvjax.models.mrm import MRM, save_mrm
from kvjax.train.data import step_dataset
from kvjax.train.flops import decoder_step_flops
from kvjax.train.loop import run
from kvjax.train.metrics import Work
from kvjax.train.mrm_config import MRMConfig, read_config
from kvjax.train.program import run_main, settle, show_result, train_options
from kvjax.train.reward_data import RewardBatch, RewardFile, make_batches
from kvjax.train.step import Loss, Sums, init_state, make_mesh, make_step

__all__ = ["build", "main", "make_optimizer", "mean_error", "mrm_loss", "train"]

Array = jax.Array
_ABOUT = """Teach a decoder to rate every token that could follow a text.

Run the same command again after an interruption: it goes on from its last checkpoint."""


def mrm_loss(
    mrm: MRM, seen: np.ndarray, *, pull: float = 0.0, full: bool = False
) -> Loss:  # fmt: skip
    """The squared error of the rewards foretold of the tokens that follow; the metric is `mae`.

    With the head "max-consistency" only a text's last reward is its own target; before that it is
    the best that the model foretells one token later, which passes no gradient.

    Args:
        mrm: the model.
        seen: bool[V], among which that best is sought.
        pull: weight of the squared marginal of a random token at each place.
        full: whether gradients reach the decoder's own parameters.
    """

    def loss(params: dict[str, Any], batch: RewardBatch) -> Sums:
        base = params["base"] if full else jax.lax.stop_gradient(params["base"])
        decoder, head = mrm.decoder({**params, "base": base}), params["head"]
        tokens, weights = jnp.asarray(batch.tokens), jnp.asarray(batch.weights)[:, 1:]
        hidden = _hidden(decoder, tokens[:, :-1])
        target = jnp.asarray(batch.reward)[:, 1:]
        if mrm.head == "max-consistency":
            target = _best_later(mrm, decoder, head, hidden, seen, target, weights)
        error = mrm.reward_of(decoder, head, hidden, tokens[:, 1:]) - target
        total = jnp.sum(weights * error**2)
        if pull:
            drawn = jnp.asarray(batch.drawn)[:, 1:]
            marginal = mrm.marginal_of(decoder, head, hidden, drawn)
            total += pull * jnp.sum(weights * marginal**2)
        return Sums(total, jnp.sum(weights), {"mae": jnp.sum(weights * jnp.abs(error))})

    return loss


def _hidden(decoder: Decoder, tokens: Array) -> Array:
    """Hidden states [B, T, E] of int32[B, T]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    return decoder(tokens, positions, (), causal_attend(decoder.config.layer_windows()))[0]


def _best_later(
    mrm: MRM, decoder: Decoder, head: dict[str, Array], hidden: Array, seen: np.ndarray,
    reward: Array, weights: Array,
) -> Array:  # fmt: skip
    """Targets float32[B, T]: the best foretold after the next token, or the last reward itself."""
    hidden = jax.lax.stop_gradient(hidden)

    def best(row: Array) -> Array:  # a row at a time: all rewards of all rows would fill the memory
        rewards = mrm.rewards(decoder, head, row)
        return jnp.max(jnp.where(jnp.asarray(seen)[None], rewards, -jnp.inf), axis=-1)

    later = jax.lax.stop_gradient(jax.lax.map(best, hidden))
    later = jnp.concatenate([later[:, 1:], reward[:, -1:]], axis=1)
    left = jnp.cumsum(weights[:, ::-1], axis=1)[:, ::-1]
    return jnp.where(left > 1.5, later, reward)


def make_optimizer(config: MRMConfig) -> optax.GradientTransformation:
    """AdamW for what is trained; the decoder's parameters stand still unless `full`."""
    rate: Any = config.learning_rate
    if config.warmup_steps:
        rate = optax.schedules.linear_schedule(0.0, rate, config.warmup_steps)
    adamw = optax.adamw(rate, weight_decay=config.weight_decay)
    plain = optax.adam(rate)
    base = adamw if config.full else optax.set_to_zero()
    parts: dict[Any, optax.GradientTransformation] = {"base": base, "lora": adamw, "head": plain}

    def labels(params: dict[str, Any]) -> dict[str, Any]:
        return {name: jax.tree.map(lambda _: name, part) for name, part in params.items()}  # noqa: B023

    return optax.partition(parts, labels)


def build(config: MRMConfig, vocab_size: int) -> tuple[MRM, dict[str, Any]]:
    """The model and its first parameters.

    Raises:
        InputError: the base has another vocabulary than the data.
    """
    fresh = config.model
    model = fresh if fresh is not None and not config.base else hf.read_config(Path(config.base))
    if model.vocab_size != vocab_size:
        raise InputError(
            f"{config.data} has tokens of a vocabulary of {vocab_size}, the decoder one of "
            f"{model.vocab_size}: use data that were made for it"
        )
    if config.base:
        graph, base, model = hf.load(config.base, dtype="float32")
    else:
        graph, base = nnx.split(Decoder(model, rngs=nnx.Rngs(config.seed)))
    mrm = MRM(graph, model, config.head, None if config.full else config.lora)
    return mrm, mrm.init(base, config.seed)


def mean_error(
    mrm: MRM, params: dict[str, Any], file: RewardFile, rows: int = 64
) -> dict[str, float]:  # fmt: skip
    """How far the foretold rewards of a file's own tokens are from what they are: mean, and R²."""
    seen = np.asarray(file.arrays["seen"])
    loss = jax.jit(mrm_loss(MRM(mrm.graph, mrm.config, _plain(mrm.head), mrm.lora), seen))
    total, weight, mae, rewards = 0.0, 0.0, 0.0, []
    for first in range(0, len(file), rows):
        tokens, reward, mask, _ = zip(
            *(file[i] for i in range(first, min(first + rows, len(file)))), strict=True
        )
        weights = np.stack(mask).astype(np.float32)
        arrays = np.stack(tokens), np.stack(reward), weights
        sums = loss(params, RewardBatch(*arrays, np.zeros_like(arrays[0])))
        total, weight = total + float(sums.loss), weight + float(sums.weight)
        mae += float(sums.metrics["mae"])
        rewards.append(arrays[1][weights > 0])
    spread = float(np.var(np.concatenate(rewards)))
    return {"mae": mae / weight, "r2": 1 - total / weight / spread if spread else 0.0}


def _plain(head: str) -> str:
    """The head whose targets are the rewards themselves."""
    return "paper" if head == "max-consistency" else head


def train(config: MRMConfig, folder: Path) -> dict[str, Any]:
    """Trains or resumes, measures, writes `folder`/model; returns the run's figures."""
    file = RewardFile(Path(config.data))
    seen = np.asarray(file.arrays["seen"])
    mrm, params = build(config, len(seen))
    machine, optimizer = config.machine, make_optimizer(config)
    mesh = make_mesh(machine.data, machine.fsdp, machine.model)
    settle(folder, config)
    start = time.perf_counter()
    state = init_state(params, optimizer, mesh=mesh, ema=config.step.ema_decay is not None)
    batches = make_batches(
        file, size=config.batch_size, seed=config.seed, scheme=config.scheme,
        answers_only=config.answers_only,
    )  # fmt: skip
    length = file.arrays["tokens"].shape[1] - 1
    flops = decoder_step_flops(mrm.config, config.batch_size, length, 1)
    work = Work(config.batch_size * length, flops)
    loss = mrm_loss(mrm, seen, pull=config.pull, full=config.full)
    state = run(
        make_step(loss, optimizer, config.step, like=state),
        state,
        step_dataset(batches, config.steps, workers=machine.workers),
        steps=config.steps, folder=folder, save_every=config.save_every,
        log_every=config.log_every, keep_last=machine.keep_last, keep_every=machine.keep_every,
        work=lambda batch: work, tensorboard=machine.tensorboard,
    )  # fmt: skip
    best = state.best_params
    save_mrm(folder / "model", mrm, best, seen)
    trained = best if config.full else {name: best[name] for name in best if name != "base"}
    measured = RewardFile(Path(config.eval_data)) if config.eval_data else file
    error = mean_error(mrm, best, measured)
    return {
        "steps": int(state.step),
        "seconds": round(time.perf_counter() - start, 1),
        "trained_parameters": sum(x.size for x in jax.tree.leaves(trained)),
        "seen_tokens": int(seen.sum()),
        **{name: round(value, 4) for name, value in error.items()},
        "measured_on": str(measured.path),
        "model": str(folder / "model"),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = train_options(argv, "mrm", "mrm_tiny", read_config, _ABOUT)
    result = train(options.fields, options.out)
    line = (
        f"{result['steps']} steps; rewards are foretold to within {result['mae']} on average "
        f"(R² {result['r2']}) on {result['measured_on']}; the model is in {result['model']}"
    )
    return show_result(result, line, options.json)


if __name__ == "__main__":
    # By its own name, not as __main__: the processes that make batches import it again.
    from kvjax.train import mrm

    run_main(mrm.main)
