"""`kvjax train label-rewards`: rates every beginning of texts, ahead of the training of an MRM.

The judge is any reward model that answers with a token (reward.json in its folder), and a reward is
log P(good) - log P(bad). Where it has to be asked, by tokens that follow the text, each beginning
is a pass of its own; where the text's own last token asks, one pass rates all of them. Without a
model, a safety world judges what its own speaker says.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from kvjax.errors import InputError
from kvjax.models import hf
from kvjax.models.attention import causal_attend
from kvjax.models.reward import TokenReward, read_reward
from kvjax.safety_world import SafetyWorld, sample
from kvjax.train.program import run_main, show_result
from kvjax.train.reward_data import write_rewards

__all__ = ["label", "main", "safety_rewards"]

Array = jax.Array


def label(
    graph: nnx.GraphDef[Any], params: Any, reward: TokenReward, tokens: np.ndarray,
    mask: np.ndarray, *, rows: int = 64,
) -> np.ndarray:  # fmt: skip
    """What a reward model says of each beginning, in nats.

    Args:
        graph: of the decoder.
        params: of the decoder.
        reward: how it is asked, and which tokens answer.
        tokens: int32[n, T].
        mask: bool[n, T], which beginnings are wanted, by their last token.
        rows: texts of a pass.

    Returns:
        float32[n, T], 0 where the mask is not.
    """
    out = np.zeros(tokens.shape, np.float32)
    row, place = np.nonzero(mask)
    judge = _judge(graph, reward)
    if not reward.ask:
        for first in range(0, len(tokens), rows):
            out[first : first + rows] = judge(params, tokens[first : first + rows], None)
        return np.where(mask, out, 0)
    for first in range(0, len(row), rows):
        r, p = row[first : first + rows], place[first : first + rows]
        asked = _with_question(tokens[r], p, reward.ask)
        out[r, p] = judge(params, asked, p + len(reward.ask))
    return out


def _with_question(tokens: np.ndarray, place: np.ndarray, ask: tuple[int, ...]) -> np.ndarray:
    """int32[n, T + S]: each text up to and with `place`, then the question, then zeros."""
    out = np.zeros((len(tokens), tokens.shape[1] + len(ask)), np.int32)
    kept = np.arange(tokens.shape[1])[None] <= place[:, None]
    out[:, : tokens.shape[1]] = np.where(kept, tokens, 0)
    at = place[:, None] + 1 + np.arange(len(ask))[None]
    np.put_along_axis(out, at, np.array([ask], np.int32), axis=1)
    return out


def _judge(graph: nnx.GraphDef[Any], reward: TokenReward) -> Any:
    @jax.jit
    def judge(params: Any, tokens: Array, place: Array | None) -> Array:
        decoder = nnx.merge(graph, params)
        positions = jnp.broadcast_to(
            jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape
        )
        attend = causal_attend(decoder.config.layer_windows())
        hidden = decoder(tokens, positions, (), attend)[0]
        if place is not None:
            hidden = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
        logits = decoder.logits(hidden)
        return logits[..., reward.good] - logits[..., reward.bad]

    return judge


def safety_rewards(
    world: SafetyWorld, path: Path, *, rows: int, seed: int, prefill: int = 10, noise: float = 0.5
) -> None:
    """Writes what a safety world's speaker says, rated by the world.

    Half of the answers begin with a prefill, and only common synonyms are said, so that the others
    are tokens that training never sees. Topics are mixed unevenly, otherwise than in prompts.

    Args:
        world: what the world is drawn from.
        path: of the file.
        rows: answers.
        seed: of the answers and of the noise.
        prefill: tokens of the attacker, which have no reward.
        noise: standard deviation of the judge's.
    """
    built, rng = world.build(), np.random.default_rng(seed)
    share = np.random.default_rng(world.seed).dirichlet(np.ones(world.topics))
    topic, length = rng.choice(world.topics, rows, p=share), world.length + prefill
    parts = [
        sample(built, rng, part, prefill=forced, length=length, common=True)
        for part, forced in zip(np.array_split(topic, 2), (0, prefill), strict=True)
    ]
    tokens = np.concatenate([part.encoded(built) for part in parts])
    reward = np.zeros(tokens.shape, np.float32)
    start = len(built.prompt(0))
    reward[:, start:-1] = np.concatenate([part.rewards(built, rng, noise) for part in parts])
    mask = np.zeros(tokens.shape, bool)
    mask[:, start:-1] = True
    write_rewards(path, tokens, np.full(rows, start), mask, reward, world.vocab_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """Rate every beginning of texts, for the training of a multifurcation reward model.

    Give a reward model and texts, or neither: then a safety world rates what it says itself.
    """

    out: Path
    """The .npz file to write."""
    reward: Path | None = None
    """Folder of a reward model with reward.json, such as one of `kvjax train prm`."""
    texts: Path | None = None
    """A .npz file with tokens int32[n, T], prompt_len int32[n] and mask bool[n, T]."""
    world: SafetyWorld = dataclasses.field(default_factory=SafetyWorld)
    """The safety world, if there is no reward model."""
    rows: int = 10_000
    """Answers that the world gives."""
    seed: int = 1
    """Of those answers; the world has its own."""
    batch: int = 64
    """Texts of a pass of the reward model."""
    json: bool = False
    """End with one JSON object on stdout."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = tyro.cli(_Options, prog="kvjax train label-rewards", args=argv)
    if (options.reward is None) != (options.texts is None):
        raise InputError("give --reward and --texts together, or neither for a safety world")
    if options.rows < 2 or options.batch < 1:
        raise InputError("rows must be 2 or more, and batch 1 or more")
    if options.reward is None or options.texts is None:
        safety_rewards(options.world, options.out, rows=options.rows, seed=options.seed)
    else:
        _label_file(options.reward, options.texts, options.out, options.batch)
    with np.load(options.out) as file:
        result = {
            "rows": len(file["tokens"]), "rewards": int(file["mask"].sum()),
            "seen_tokens": int(file["seen"].sum()), "file": str(options.out),
        }  # fmt: skip
    line = f"{result['rewards']} rewards of {result['rows']} texts; see {options.out}"
    return show_result(result, line, options.json)


def _label_file(model: Path, texts: Path, out: Path, rows: int) -> None:
    try:
        with np.load(texts) as file:
            tokens, prompt_len, mask = file["tokens"], file["prompt_len"], file["mask"]
    except (OSError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())
        raise InputError(
            f"{texts}: cannot be read ({problem}): give tokens, prompt_len and mask in one .npz"
        ) from None
    graph, params, config = hf.load(model, dtype="float32")
    if tokens.ndim != 2 or mask.shape != tokens.shape or not tokens.size:
        raise InputError(f"{texts}: tokens {tokens.shape} and mask {mask.shape} must be [n, T]")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise InputError(
            f"{texts}: tokens are not all within {model}'s vocabulary of {config.vocab_size}: "
            "encode the texts with its tokenizer"
        )
    reward = label(graph, params, read_reward(model), tokens.astype(np.int32), mask, rows=rows)
    write_rewards(out, tokens, prompt_len, mask, reward, config.vocab_size)


if __name__ == "__main__":
    run_main(main)
