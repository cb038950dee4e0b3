"""What a reward model learns from: plays of the policy with their outcomes, and model plays.

Drawn plays are files of a run's round, each a pure function of the parameters, the seed and its
number; one that is missing is made again, so an interrupted run goes on from those there are.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from kvjax.errors import InputError
from kvjax.models.countdown.game import Problem, judge, problem
from kvjax.models.reward import TokenReward
from kvjax.models.tokenizer import Tokenizer
from kvjax.train.chat import PAD
from kvjax.train.lm import encode_batch
from kvjax.train.prm_config import PRMConfig
from kvjax.train.tasks import Mixture, Setting
from kvjax.train.tasks.encode import ChatEncoder

__all__ = ["Batch", "asked_places", "draw_plays", "letter_reward", "make_batches", "outcomes"]

# Answers of up to 112 tokens: a play has up to 96.
PLAYS = Mixture(tasks=("countdown",), setting=Setting(tokens=320))
_ENDS = ("=", ":", ";")
Sampler = Callable[..., Any]


class Batch(NamedTuple):
    """Model plays and drawn plays of one step.

    Behind the T tokens of a play stand S that ask, one for each step's end. They see the play up to
    there and nothing sees them; of a model play they mean nothing.

    Attributes:
        tokens: int32[B, T + S].
        asked: int32[B, S], the place of each step's end.
        places: int32[B, A], where a token is predicted.
        targets: int32[B, A], which: the play's next one, or the outcome.
        weights: float32[B, A], 0 where `places` pads.
    """

    tokens: np.ndarray
    asked: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def letter_reward(config: PRMConfig, tokenizer: Tokenizer) -> TokenReward:
    """How the model judges, in token ids."""
    ids = [_id(tokenizer, x) for x in (config.ask, config.good, config.bad)]
    return TokenReward(ask=(ids[0],), good=ids[1], bad=ids[2])


def _id(tokenizer: Tokenizer, letter: str) -> int:
    found = tokenizer.backend.token_to_id(letter)
    if found is None:
        raise InputError(f"the policy's tokenizer has no token {letter!r}: give another letter")
    return found


def asked_places(tokens: np.ndarray, tokenizer: Tokenizer, asks: int) -> tuple[Any, Any]:
    """The first `asks` ends of steps of plays [B, T]: int32[B, asks] places, bool which are there.

    No problem has the letters that end steps, so they are all in the plays.
    """
    is_end = np.isin(tokens, [_id(tokenizer, letter) for letter in _ENDS])
    places = np.argsort(~is_end, axis=1, kind="stable")[:, :asks]
    there = np.arange(asks)[None] < is_end.sum(axis=1)[:, None]
    return np.where(there, places, 0).astype(np.int32), there


def outcomes(
    tokens: np.ndarray, problems: list[Problem], lengths: np.ndarray, tokenizer: Tokenizer
) -> np.ndarray:
    """Whether each play [B, T] solves its problem: bool[B]."""
    vocab = tokenizer.backend.get_vocab()
    letters = {i: text for text, i in vocab.items() if len(text) == 1} | {vocab["Ġ"]: " "}
    end = tokenizer.eos_ids[0]
    right = []
    for row, asked, length in zip(tokens.tolist(), problems, lengths.tolist(), strict=True):
        answer = row[length:]
        answer = answer[: answer.index(end)] if end in answer else []
        right.append(judge(asked, "".join(letters.get(token, "?") for token in answer)))
    return np.asarray(right, bool)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Where a round's plays are: tokens uint16[n, T] and their outcomes bool[n]."""

    tokens: Path
    right: Path


def draw_plays(
    config: PRMConfig,
    sampler: Sampler,
    params: Any,
    tokenizer: Tokenizer,
    folder: Path,
    round_: int,
) -> Drawn:
    """Draws a round's plays, those aside that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = Drawn(folder / "tokens.npy", folder / "right.npy")
    if whole.right.exists():
        return whole
    count = config.rollouts // config.rollout_rows
    parts = [folder / f"part_{number:05}.npz" for number in range(count)]
    for number, path in enumerate(tqdm(parts, desc="plays", unit="part", disable=None)):
        if not path.exists():
            seed = config.seed + 1 + round_
            first = number * (config.rollout_rows // config.same_problem)
            found = sample_problems(
                sampler, params, tokenizer, seed, first, config.rollout_rows, config.same_problem,
                config.length,
            )  # fmt: skip
            part = path.with_suffix(".part.npz")
            np.savez(part, tokens=found[0].astype(np.uint16), right=found[1])
            part.replace(path)
    loaded = [np.load(path) for path in parts]
    np.save(whole.tokens, np.concatenate([part["tokens"] for part in loaded]))
    np.save(whole.right, np.concatenate([part["right"] for part in loaded]))
    for path in parts:
        path.unlink()
    return whole


def sample_problems(
    sampler: Sampler, params: Any, tokenizer: Tokenizer, seed: int, first: int, rows: int,
    same_problem: int, length: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Plays of the problems from number `first` of a seed on: int32[rows, T], and bool[rows]."""
    numbers = range(first, first + rows // same_problem)
    problems = [asked for n in numbers for asked in [problem(seed, n)[0]] * same_problem]
    prompts = np.full((rows, length), tokenizer.backend.token_to_id(PAD), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row in range(0, rows, same_problem):
        ids = tokenizer.encode_chat([{"role": "user", "content": problems[row].text}])
        prompts[row : row + same_problem, : len(ids)] = ids
        lengths[row : row + same_problem] = len(ids)
    key = jax.random.fold_in(jax.random.key(seed), first)
    tokens = np.asarray(sampler(params, key, prompts, lengths))
    return tokens, outcomes(tokens, problems, lengths, tokenizer)


def make_batches(
    config: PRMConfig, tokenizer: Tokenizer, drawn: Drawn, round_: int
) -> Callable[[int], Batch]:
    """The batch of each step of a round by its number."""
    # A copy: processes that make batches are sent it, and a template that was used cannot be.
    tokenizer = dataclasses.replace(tokenizer)
    encoder = ChatEncoder(tokenizer)
    reward = letter_reward(config, tokenizer)
    length, asks, answers = config.length, config.asks, PLAYS.answer_tokens
    plays, rows = config.model_plays, config.batch_size

    def batch(step: int) -> Batch:
        out = Batch(
            np.full((plays + rows, length + asks), reward.ask[0], np.int32),
            np.zeros((plays + rows, asks), np.int32),
            np.zeros((plays + rows, answers), np.int32),
            np.zeros((plays + rows, answers), np.int32),
            np.zeros((plays + rows, answers), np.float32),
        )
        if plays:
            first = (round_ * config.steps + step) * plays
            model = encode_batch(encoder, config.seed, first, plays, length, PLAYS)
            out.tokens[:plays, :length], out.places[:plays] = model.tokens, model.places
            out.targets[:plays] = np.take_along_axis(model.tokens, model.places + 1, axis=1)
            out.weights[:plays] = model.weights
        # Opened here, so that processes that make batches share the pages of the file.
        tokens, right = np.load(drawn.tokens, mmap_mode="r"), np.load(drawn.right, mmap_mode="r")
        rng = np.random.default_rng(np.random.SeedSequence((config.seed, round_, step)))
        chosen = rng.integers(0, len(right), rows)
        own = tokens[chosen].astype(np.int32)
        out.tokens[plays:, :length] = own
        out.asked[plays:], there = asked_places(own, tokenizer, asks)
        out.places[plays:, :asks] = np.arange(length, length + asks)
        out.targets[plays:, :asks] = np.where(right[chosen], reward.good, reward.bad)[:, None]
        out.weights[plays:, :asks] = there
        return out

    return batch
