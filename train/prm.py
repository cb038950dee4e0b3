"""`kvjax train prm`: teaches a policy to foretell whether its own beginnings end well.

The reward model is the policy itself: after any step it can be asked, by a token, and answers with
one. So a search needs one model and one cache; the question reads the keys and values that the
play has already.
"""

import functools
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
from kvjax.models.decoder import Attend, Decoder, DecoderConfig
from kvjax.models.reward import save_reward
from kvjax.models.tokenizer import Tokenizer
from kvjax.train.chat import PAD, save_tokenizer
from kvjax.train.data import step_dataset
from kvjax.train.flops import decoder_step_flops
from kvjax.train.loop import run
from kvjax.train.losses import cross_entropy, output_kernel
from kvjax.train.metrics import Work
from kvjax.train.prm_config import PRMConfig, read_config
from kvjax.train.prm_data import (
    Batch,
    asked_places,
    draw_plays,
    letter_reward,
    make_batches,
    sample_problems,
)
from kvjax.train.prm_gates import gates, judge_quality
from kvjax.train.program import run_main, settle, show_result, train_options
from kvjax.train.rollouts import make_sampler
from kvjax.train.step import Loss, Sums, init_state, make_mesh, make_step

__all__ = ["asking_attend", "main", "outcome_loss", "train"]

Array = jax.Array
_ABOUT = """Teach a policy to judge its own beginnings, from how its plays end.

Run the same command again after an interruption: it goes on from its last checkpoint."""


def asking_attend(asked: Array, length: int) -> Attend:
    """Attention of plays with their questions behind them; no state.

    Args:
        asked: int32[B, S], the place of each question in the play.
        length: T, tokens of a play; q is [B, T + S, H, D].
    """
    place = jnp.arange(length + asked.shape[1], dtype=jnp.int32)
    query, key = place[None, :, None], place[None, None, :]
    reach = jnp.concatenate(
        [jnp.broadcast_to(place[None, :length], (asked.shape[0], length)), asked], axis=1
    )
    mask = ((key < length) & (key <= reach[..., None])) | (key == query)

    def attend(layer: Array, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        precision = "highest" if q.dtype == jnp.float32 else "default"
        with jax.default_matmul_precision(precision):
            out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")
        return out, state

    return attend


def ask(decoder: Decoder, tokens: Array, asked: Array) -> Array:
    """Hidden states [B, T + S, E] of plays and of the questions behind them."""
    length = tokens.shape[1] - asked.shape[1]
    plain = jnp.arange(length, dtype=jnp.int32)[None]
    own = jnp.broadcast_to(plain, (tokens.shape[0], length))
    positions = jnp.concatenate([own, asked + 1], axis=1)
    return decoder(tokens, positions, (), asking_attend(asked, length))[0]


def outcome_loss(graph: nnx.GraphDef[Any]) -> Loss:
    """The cross-entropy of model plays and of outcomes, in nats; the metric is `accuracy`."""

    def loss(params: nnx.State[Any, Any], batch: Batch) -> Sums:
        decoder = nnx.merge(graph, params)
        hidden = ask(decoder, jnp.asarray(batch.tokens), jnp.asarray(batch.asked))
        hidden = jnp.take_along_axis(hidden, batch.places[..., None], axis=1)
        weights = jnp.asarray(batch.weights)
        kernel = output_kernel(decoder, hidden.dtype)
        nats, right = cross_entropy(hidden, kernel, jnp.asarray(batch.targets), weights)
        return Sums(nats, jnp.sum(weights), {"accuracy": right})

    return loss


def _judgements(
    graph: nnx.GraphDef[Any], config: PRMConfig, tokenizer: Tokenizer, params: Any,
    tokens: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What the model foretells after each step: float[B, S], and which steps are there."""
    reward = letter_reward(config, tokenizer)
    asked, there = asked_places(tokens, tokenizer, config.asks)
    whole = np.concatenate([tokens, np.full(asked.shape, reward.ask[0], np.int32)], axis=1)

    @jax.jit
    def chance(params: Any, whole: Array, asked: Array) -> Array:
        decoder = nnx.merge(graph, params)
        logits = decoder.logits(ask(decoder, whole, asked)[:, -asked.shape[1] :])
        return jax.nn.sigmoid(logits[..., reward.good] - logits[..., reward.bad])

    size = 512
    parts = [
        chance(params, whole[i : i + size], asked[i : i + size]) for i in range(0, len(whole), size)
    ]
    return np.concatenate([np.asarray(part) for part in parts]), there


def _optimizer(config: PRMConfig) -> optax.GradientTransformation:
    schedule = optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0, peak_value=config.learning_rate,
        warmup_steps=min(config.warmup_steps, config.steps // 2), decay_steps=config.steps,
    )  # fmt: skip
    return optax.adam(schedule, b2=0.98)


def _round(
    config: PRMConfig, folder: Path, graph: nnx.GraphDef[Any], params: Any, model: DecoderConfig,
    tokenizer: Tokenizer, number: int,
) -> Any:  # fmt: skip
    """Draws plays from the parameters and trains them on; returns what becomes of them."""
    sampler = _sampler(graph, tokenizer)
    cast = _computing(config, params)
    drawn = draw_plays(config, sampler, cast, tokenizer, folder / "plays", number)
    machine, optimizer = config.machine, _optimizer(config)
    mesh = make_mesh(machine.data, machine.fsdp, machine.model)
    state = init_state(params, optimizer, mesh=mesh, ema=config.step.ema_decay is not None)
    work = Work(
        (config.batch_size + config.model_plays) * (config.length + config.asks),
        decoder_step_flops(
            model, config.batch_size + config.model_plays, config.length + config.asks, 112
        ),
    )
    state = run(
        make_step(outcome_loss(graph), optimizer, config.step, like=state),
        state,
        step_dataset(
            make_batches(config, tokenizer, drawn, number), config.steps, workers=machine.workers
        ),
        steps=config.steps, folder=folder, save_every=config.save_every,
        log_every=config.log_every, keep_last=machine.keep_last, keep_every=machine.keep_every,
        work=lambda batch: work, tensorboard=machine.tensorboard,
    )  # fmt: skip
    return state.best_params


def _sampler(graph: nnx.GraphDef[Any], tokenizer: Tokenizer) -> Any:
    pad = tokenizer.backend.token_to_id(PAD)
    if pad is None:
        raise InputError(f"the policy's tokenizer has no {PAD}: train it with `kvjax train lm`")
    return make_sampler(graph, tokenizer.eos_ids[0], pad)


def _computing(config: PRMConfig, params: Any) -> Any:
    """The parameters in the type that plays are drawn in."""
    dtype = jnp.dtype(config.step.compute_dtype)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def train(config: PRMConfig, folder: Path) -> dict[str, Any]:
    """Trains or resumes, measures, writes `folder`/model; returns the run's figures."""
    graph, params, model = hf.load(config.policy, dtype="float32")
    tokenizer = Tokenizer.load(Path(config.policy))
    settle(folder, config)
    start = time.perf_counter()
    for number in range(config.rounds):
        own = folder / f"round_{number}"
        if not (own / "model" / "config.json").exists():
            params = _round(config, own, graph, params, model, tokenizer, number)
            hf.save(own / "model", model, params, dtype="float32")
        params = hf.load(own / "model", dtype="float32")[1]
    seconds = time.perf_counter() - start
    hf.save(folder / "model", model, params, dtype="bfloat16")
    save_tokenizer(folder / "model", tokenizer, max_positions=model.max_positions)
    save_reward(folder / "model", letter_reward(config, tokenizer))
    measured = _measure(config, graph, params, tokenizer)
    return {
        "rounds": config.rounds,
        "seconds": round(seconds, 1),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        **measured,
        "gates": gates(measured),
        "model": str(folder / "model"),
    }


def _measure(
    config: PRMConfig, graph: nnx.GraphDef[Any], params: Any, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The policy at temperature 1 on fresh problems, and how well it foretells its outcomes."""
    sampler = _sampler(graph, tokenizer)
    rows = config.eval_problems * config.eval_rollouts
    tokens, right = sample_problems(
        sampler, _computing(config, params), tokenizer, config.eval_seed, 0, rows,
        config.eval_rollouts, config.length,
    )  # fmt: skip
    judge = functools.partial(_judgements, graph, config, tokenizer, params)
    chances, there = judge(tokens)
    return judge_quality(chances, there, right, config.eval_rollouts)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = train_options(argv, "prm", "prm_countdown", read_config, _ABOUT)
    result = train(options.fields, options.out)
    failed = [name for name, holds in result["gates"].items() if not holds]
    line = (
        f"the policy is right in {result['success']:.1%} of its plays, and foretells "
        f"{result['mean_chance']:.1%}; "
        + (f"gates that fail: {', '.join(failed)}" if failed else "all gates hold")
        + f"; the model is in {result['model']}"
    )
    return show_result(result, line, options.json)


if __name__ == "__main__":
    # By its own name, not as __main__: the processes that make batches import it again.
    from kvjax.train import prm

    run_main(prm.main)
