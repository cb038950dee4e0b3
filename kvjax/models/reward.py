"""Process reward models: how good a solution's beginning is.

A decoder says it in one of two ways. With tokens: after the step stands a token that asks, and the
model weighs a good token against a bad one (Math-Shepherd, Wang et al. 2023, and those after it).
Or by a head: one number, read off the hidden state of the step's last token. Both are questions
about the next token, so whatever generates can also judge: `value_decoder` writes a head as an
output layer. A model that asks with a token of its own can be policy and judge in one: the question
hangs on the path's keys and values and is no part of it.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.errors import InputError
from kvjax.models.decoder import Decoder, DecoderConfig

__all__ = [
    "MATH_SHEPHERD", "RLHFLOW", "TokenReward", "ValueReward", "read_reward", "save_reward",
    "value_decoder",
]  # fmt: skip

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenReward:
    """A reward model that answers with a token.

    Attributes:
        good, bad: ids of the two answers.
        ask: ids that follow a step's last token; empty where that token itself asks.
    """

    good: int
    bad: int
    ask: tuple[int, ...] = ()

    def reward(self, good: float, bad: float) -> float:
        """The probability of good against bad, from the log-probabilities of both."""
        return 1 / (1 + math.exp(min(bad - good, 700.0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueReward:
    """A reward model with a head, run as `value_decoder` writes it.

    Attributes:
        vocab_size: of the decoder.
        bias: of the head.
    """

    vocab_size: int
    bias: float = 0.0
    ask: tuple[int, ...] = ()

    def reward(self, logprob: float) -> float:
        """The sigmoid of the head's value, from the log-probability of token 0."""
        # p = e^z / (e^z + V - 1), since all other logits are 0.
        others = -math.expm1(logprob) if logprob < 0 else math.ulp(1.0)
        value = logprob - math.log(others) + math.log(self.vocab_size - 1) + self.bias
        return 1 / (1 + math.exp(min(-value, 700.0)))


MATH_SHEPHERD = TokenReward(ask=(12902,), good=648, bad=387)
"""peiyi9979/math-shepherd-mistral-7b-prm: the tag, + and -."""
RLHFLOW = TokenReward(good=10, bad=12)
"""RLHFlow's Llama 3 models, where a step is the user's turn and an answer is opened: + and -."""


def value_decoder(
    config: DecoderConfig, params: nnx.State[Any, Any], kernel: Array
) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any], DecoderConfig]:
    """A decoder whose output layer is a reward head: `ValueReward` reads it.

    Args:
        config: of the model under the head.
        params: of its `nnx.split`; an output layer there is left out.
        kernel: float[E], the head.

    Returns:
        graph, params and config of a decoder whose logits are the head's value for token 0, and 0
        for all others.
    """
    config = dataclasses.replace(config, tie_embeddings=False)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    leaf: Any = shapes["head"]["kernel"]
    head = jnp.zeros(leaf.shape, leaf.dtype).at[:, 0].set(kernel.astype(leaf.dtype))

    def fill(path: tuple, _: Any) -> Array:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if keys[0] == "head":
            return head
        found: Any = params
        for key in keys:
            found = found[key]
        return found[...] if isinstance(found, nnx.Variable) else found

    return graph, jax.tree_util.tree_map_with_path(fill, shapes), config


def save_reward(folder: Path, reward: TokenReward) -> None:
    """Notes in a model's folder how it judges, in reward.json."""
    text = json.dumps(dataclasses.asdict(reward), indent=2) + "\n"
    (folder / "reward.json").write_text(text, encoding="utf-8")


def read_reward(folder: Path) -> TokenReward:
    """How the model of a folder judges, from its reward.json.

    Raises:
        InputError: there is none, or it cannot be used.
    """
    path = folder / "reward.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return TokenReward(good=fields["good"], bad=fields["bad"], ask=tuple(fields["ask"]))
    except OSError:
        raise InputError(
            f"{folder}: no reward.json, so this is no reward model: give one that "
            "`kvjax train prm` made, or say with which tokens it judges"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be used ({error}): it needs good, bad and ask") from None
