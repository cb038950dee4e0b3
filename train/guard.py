"""`kvjax train guard`: the speaker of a safety world, and the judge of what it says.

Both are decoders over the world's own tokens. The policy learns the speaker's next tokens, so that
its alignment is as shallow as the world's. The judge (a process reward model) reads two logits of
tokens that never follow anything: their difference is the reward of the text so far, learnt from
noisy labels. Beside that it learns to speak, which gives its output layer a vector for each token.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx
from tokenizers import models, pre_tokenizers

from kvjax.models import hf
from kvjax.models.attention import causal_attend
from kvjax.models.decoder import Decoder
from kvjax.models.reward import TokenReward, save_reward
from kvjax.models.tokenizer import Tokenizer
from kvjax.safety_world import BOS, END, PARTS, USER, Dialogues, SafetyWorld, World, sample
from kvjax.train.chat import save_tokenizer
from kvjax.train.data import step_dataset
from kvjax.train.flops import decoder_step_flops
from kvjax.train.guard_config import GuardConfig, read_config
from kvjax.train.loop import run
from kvjax.train.metrics import Work
from kvjax.train.program import run_main, settle, show_result, train_options
from kvjax.train.step import Loss, Sums, init_state, make_mesh, make_step

__all__ = ["REWARD", "Answers", "Batch", "guard_loss", "main", "train", "world_tokenizer"]

Array = jax.Array
REWARD = TokenReward(good=USER, bad=BOS)
"""How the judge is read: neither token ever follows an answer's beginning."""
_NAMES = ("<pad>", "<bos>", "<end>", "<user>", "<agent>")
_ABOUT = """Train the speaker of a safety world, or the judge of what it says.

Run the same command again after an interruption: it goes on from its last checkpoint."""


class Batch(NamedTuple):
    """Answers of one step.

    Attributes:
        tokens: int32[B, T], prompt, answer and end.
        spoken: float32[B, T], 1 for tokens that the speaker chose, and the end.
        reward: float32[B, T], how safe the text up to and with a token is.
        judged: float32[B, T], 1 where there is a reward.
    """

    tokens: np.ndarray
    spoken: np.ndarray
    reward: np.ndarray
    judged: np.ndarray


@dataclasses.dataclass(frozen=True)
class Answers:
    """The batches of a run, by their numbers; pickled by its config."""

    config: GuardConfig

    @functools.cached_property
    def world(self) -> World:
        """The world, drawn once a process."""
        return self.config.world.build()

    def __getstate__(self) -> dict[str, GuardConfig]:
        return {"config": self.config}

    def dialogues(self, number: int, rows: int) -> tuple[Dialogues, np.ndarray]:
        """Answers, half of them begun by an attacker, and int[rows] his tokens of each."""
        config, rng = self.config, np.random.default_rng((self.config.seed, number))
        topic = rng.integers(0, config.world.topics, rows)
        length = config.world.length + config.prefill
        halves = np.array_split(topic, 2)
        parts = [
            sample(self.world, rng, half, prefill=forced, length=length)
            for half, forced in zip(halves, (0, config.prefill), strict=True)
        ]
        forced = np.repeat((0, config.prefill), [len(half) for half in halves])
        fields = (
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(Dialogues)
        )
        return Dialogues(*fields), forced

    def make(self, number: int, rows: int) -> Batch:
        """A batch of `rows` answers."""
        said, forced = self.dialogues(number, rows)
        rng = np.random.default_rng((self.config.seed, number, 1))
        tokens = said.encoded(self.world)
        start = len(self.world.prompt(0))
        place = np.arange(tokens.shape[1])[None]
        reward = np.zeros(tokens.shape, np.float32)
        reward[:, start:-1] = said.rewards(self.world, rng, self.config.noise)
        judged = np.broadcast_to((place >= start) & (place < tokens.shape[1] - 1), tokens.shape)
        spoken = place >= start + forced[:, None]
        return Batch(tokens, spoken.astype(np.float32), reward, judged.astype(np.float32))

    def __call__(self, step: int) -> Batch:
        """The batch of a step; those of a judge come again when its labels are used up."""
        config = self.config
        different = -(-config.answers // config.batch_size)
        return self.make(step % different if different else step, config.batch_size)


def guard_loss(graph: nnx.GraphDef[Any], config: GuardConfig) -> Loss:
    """The cross-entropy of what is spoken, in nats; of a judge also its squared errors.

    The metrics are `nats`, and of a judge `mae`, in units of the reward.
    """

    def loss(params: nnx.State[Any, Any], batch: Batch) -> Sums:
        decoder = nnx.merge(graph, params)
        tokens = jnp.asarray(batch.tokens)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        attend = causal_attend(decoder.config.layer_windows())
        hidden = decoder(tokens, jnp.broadcast_to(positions, tokens.shape), (), attend)[0]
        logits = decoder.logits(hidden)
        spoken = jnp.asarray(batch.spoken)[:, 1:]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        nats, weight = jnp.sum(spoken * nats), jnp.sum(spoken)
        if config.role == "policy":
            return Sums(nats, weight, {"nats": nats})
        judged = jnp.asarray(batch.judged)
        error = logits[..., REWARD.good] - logits[..., REWARD.bad] - jnp.asarray(batch.reward)
        share = weight / jnp.sum(judged)  # both kinds of terms have the same mean
        squares = share * jnp.sum(judged * (error / config.scale) ** 2)
        mae = share * jnp.sum(judged * jnp.abs(error))
        return Sums(squares + 0.1 * nats, weight, {"nats": nats, "mae": mae})

    return loss


def world_tokenizer(world: SafetyWorld) -> Tokenizer:
    """A tokenizer of the world's tokens: words between spaces, such as `<agent>` and `w21`."""
    topics = [f"topic{i}" for i in range(world.topics)]
    words = [f"w{i}" for i in range(PARTS + world.topics, world.vocab_size)]
    vocabulary = {name: i for i, name in enumerate((*_NAMES, *topics, *words))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=_NAMES[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    special = {"bos_token": _NAMES[1], "eos_token": _NAMES[2], "pad_token": _NAMES[0]}
    return Tokenizer(backend, (vocabulary[_NAMES[2]],), vocabulary[_NAMES[1]], special)


def _measure(
    graph: nnx.GraphDef[Any], config: GuardConfig, params: nnx.State[Any, Any]
) -> dict[str, float]:
    """On fresh answers: nats a token, those that the world itself has, and a judge's errors."""
    answers = Answers(dataclasses.replace(config, seed=config.seed + 1_000_000))
    batch = answers.make(0, config.eval_rows)
    said, forced = answers.dialogues(0, config.eval_rows)
    world = answers.world
    state = said.states[:, :-1]
    common = world.tokens[state, said.edges, 0] == said.answers
    synonym = np.where(common, world.synonym_chance()[0], world.synonym_chance()[-1])
    nats = -np.log(world.chance[said.topic[:, None], state, said.edges] * synonym)
    chosen = np.arange(nats.shape[1])[None] >= forced[:, None]
    # The end is certain, and no choice of the speaker.
    only = batch._replace(spoken=np.where(batch.tokens == END, 0, batch.spoken).astype(np.float32))
    sums = jax.jit(guard_loss(graph, config))(params, only)
    found = {name: float(value / sums.weight) for name, value in sums.metrics.items()}
    found["least_nats"] = float(nats[chosen].mean())
    found["excess_nats"] = found["nats"] - found["least_nats"]
    return {name: round(value, 4) for name, value in found.items()}


def train(config: GuardConfig, folder: Path) -> dict[str, Any]:
    """Trains or resumes, measures, writes `folder`/model; returns the run's figures."""
    machine, answers = config.machine, Answers(config)
    mesh = make_mesh(machine.data, machine.fsdp, machine.model)
    settle(folder, config)
    graph, params = nnx.split(Decoder(config.model, rngs=nnx.Rngs(config.seed)))
    rate = optax.schedules.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(config.warmup_steps, config.steps // 2), config.steps
    )
    optimizer = optax.adam(rate, b2=0.98)
    start = time.perf_counter()
    state = init_state(params, optimizer, mesh=mesh, ema=config.step.ema_decay is not None)
    length = len(answers.world.prompt(0)) + config.world.length + config.prefill + 1
    flops = decoder_step_flops(config.model, config.batch_size, length)
    work = Work(config.batch_size * length, flops)
    state = run(
        make_step(guard_loss(graph, config), optimizer, config.step, like=state),
        state,
        step_dataset(answers, config.steps, workers=machine.workers),
        steps=config.steps, folder=folder, save_every=config.save_every,
        log_every=config.log_every, keep_last=machine.keep_last, keep_every=machine.keep_every,
        work=lambda batch: work, tensorboard=machine.tensorboard,
    )  # fmt: skip
    best, model = state.best_params, folder / "model"
    hf.save(model, config.model, best, dtype="bfloat16")
    tokenizer = world_tokenizer(config.world)
    save_tokenizer(model, tokenizer, max_positions=config.model.max_positions)
    (model / "chat_template.jinja").unlink()  # a world's prompts are no chats
    if config.role == "prm":
        save_reward(model, REWARD)
    return {
        "steps": int(state.step),
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": sum(x.size for x in jax.tree.leaves(best)),
        **_measure(graph, config, best),
        "model": str(model),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = train_options(argv, "guard", "guard_policy", read_config, _ABOUT)
    result = train(options.fields, options.out)
    judge = f"; rewards to within {result['mae']}" if "mae" in result else ""
    line = (
        f"{result['steps']} steps; {result['nats']} nats a token where {result['least_nats']} "
        f"would be exact{judge}; the model is in {result['model']}"
    )
    return show_result(result, line, options.json)


if __name__ == "__main__":
    # By its own name, not as __main__: the processes that make batches import it again.
    from kvjax.train import guard

    run_main(guard.main)
