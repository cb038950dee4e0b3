"""Multifurcation reward models: one pass over a text rates every token that could follow it.

A scalar reward model rates one continuation a pass. Here the output layer of a decoder is read as
a reward head: M(s) = W f(s) + b is a vector over the vocabulary whose entry a foretells the reward
R(sa) (Saffron-1, Qiu et al. 2025, arXiv 2506.06444, section 4). Three heads stand behind one
interface:

- "paper": W f(s) + b, W the decoder's own and not trained, b trained and really added.
- "marginal": c(s) + h(s) . W_a, a baseline of the text and what a token adds to it (RAD-Q, Troshin
  et al. 2024, arXiv 2407.04615). The loss may pull what random tokens add to 0, so that tokens
  never seen fall back to the baseline.
- "max-consistency": the form of "paper", but trained to be the best that can still follow (FaRMA,
  Rashid et al. 2025, arXiv 2502.04517), which is a matter of the loss alone.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.errors import InputError
from kvjax.models import hf
from kvjax.models.decoder import Decoder, DecoderConfig
from kvjax.models.hf_files import read_json
from kvjax.models.lora import LoRA
from kvjax.models.weights import load_weights, save_weights

__all__ = ["HEADS", "MRM", "conservative", "load_mrm", "save_mrm"]

Array = jax.Array
HEADS = ("paper", "marginal", "max-consistency")


@dataclasses.dataclass(frozen=True)
class MRM:
    """What a multifurcation reward model is made of, but for its numbers.

    These are a tree: `base` the decoder's parameters, `head` those of the head, and where there is
    an adapter `lora`.

    Attributes:
        graph: of the decoder.
        config: of the decoder.
        head: one of `HEADS`.
        lora: the adapter; None where there is none, or where it was merged.
    """

    graph: nnx.GraphDef[Any]
    config: DecoderConfig
    head: str = "paper"
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise InputError(f"the head of an MRM is {self.head!r}: use one of {', '.join(HEADS)}")

    def init(self, base: nnx.State[Any, Any], seed: int) -> dict[str, Any]:
        """Parameters that begin at the decoder's: the bias is zero, the adapter changes nothing."""
        adapter = {} if self.lora is None else {"lora": self.lora.init(base, seed)}
        return {"base": base, "head": self.init_head(), **adapter}

    def init_head(self) -> dict[str, Array]:
        """The head's float32 parameters: `bias` [V], or `baseline` [E + 1], `projection` [E, E]."""
        c = self.config
        if self.head != "marginal":
            return {"bias": jnp.zeros(c.vocab_size, jnp.float32)}
        return {
            "baseline": jnp.zeros(c.embed_dim + 1, jnp.float32),
            "projection": jnp.zeros((c.embed_dim, c.embed_dim), jnp.float32),
        }

    def decoder(self, params: dict[str, Any]) -> Decoder:
        """The decoder with its adapter in it."""
        return nnx.merge(self.graph, self._merged(params))

    def merge(self, params: dict[str, Any]) -> tuple["MRM", dict[str, Any]]:
        """The same model with the adapter merged, and its parameters."""
        merged = {"base": self._merged(params), "head": params["head"]}
        return dataclasses.replace(self, lora=None), merged

    def _merged(self, params: dict[str, Any]) -> nnx.State[Any, Any]:
        if self.lora is None:
            return params["base"]
        return self.lora.merge(params["base"], params["lora"])

    def rewards(self, decoder: Decoder, head: dict[str, Array], hidden: Array) -> Array:
        """The rewards of all next tokens, float32[..., V], from hidden states [..., E]."""
        if self.head != "marginal":
            return _over_last(head["bias"].astype(jnp.float32), decoder.logits(hidden))
        added = decoder.logits(_projected(head, hidden))
        return _baseline(head, hidden)[..., None] + added

    def reward_of(
        self, decoder: Decoder, head: dict[str, Array], hidden: Array, tokens: Array
    ) -> Array:
        """The reward of one next token each, without those of the others.

        Args:
            decoder: from `decoder`.
            head: the head's parameters.
            hidden: [..., E].
            tokens: int32[...].

        Returns:
            float32[...], the entries of `rewards` at the tokens.
        """
        if self.head == "marginal":
            return _baseline(head, hidden) + self.marginal_of(decoder, head, hidden, tokens)
        return _dot(hidden, _rows(decoder, tokens)) + head["bias"][tokens].astype(jnp.float32)

    def marginal_of(
        self, decoder: Decoder, head: dict[str, Array], hidden: Array, tokens: Array
    ) -> Array:
        """What tokens add to the baseline, float32[...]; of the head "marginal" only."""
        return _dot(_projected(head, hidden), _rows(decoder, tokens))


def conservative(rewards: Array, seen: Array) -> Array:
    """Rewards float32[..., V], -inf for tokens that training never saw (`seen` bool[V])."""
    return jnp.where(seen.reshape((1,) * (rewards.ndim - 1) + (-1,)), rewards, -jnp.inf)


def _over_last(row: Array, x: Array) -> Array:
    return x + row.reshape((1,) * (x.ndim - 1) + (-1,))


def _baseline(head: dict[str, Array], hidden: Array) -> Array:
    weights = head["baseline"].astype(jnp.float32)
    row = weights[:-1].reshape((1,) * (hidden.ndim - 1) + (-1,))
    return jnp.sum(hidden.astype(jnp.float32) * row, axis=-1) + weights[-1]


def _projected(head: dict[str, Array], hidden: Array) -> Array:
    precision = "highest" if hidden.dtype == jnp.float32 else None
    projection = head["projection"].astype(hidden.dtype)
    return jnp.einsum("...e,ef->...f", hidden, projection, precision=precision)


def _rows(decoder: Decoder, tokens: Array) -> Array:
    """The output layer's vectors [..., E] of tokens."""
    table = decoder.embed[...] if decoder.head is None else decoder.head.kernel[...].T
    return table[tokens]


def _dot(a: Array, b: Array) -> Array:
    # Elementwise in float32: a reward is one number, and a product's short types would show in it.
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)


def save_mrm(folder: Path, mrm: MRM, params: dict[str, Any], seen: np.ndarray) -> None:
    """Writes a model with its adapter merged: a Hugging Face folder, and beside it the head.

    Args:
        folder: made where it does not exist; gets config.json, model.safetensors, mrm.json and
            mrm.safetensors, all float32.
        mrm: the model.
        params: its parameters.
        seen: bool[V], the tokens that training saw.
    """
    mrm, params = mrm.merge(params)
    hf.save(folder, mrm.config, params["base"], dtype="float32")
    head = {**params["head"], "seen": np.asarray(seen, np.float32)}
    save_weights(folder / "mrm.safetensors", head)
    text = json.dumps({"head": mrm.head}, indent=2) + "\n"
    (folder / "mrm.json").write_text(text, encoding="utf-8")


def load_mrm(folder: Path) -> tuple[MRM, dict[str, Any], np.ndarray]:
    """The model, its parameters and bool[V] `seen`, as `save_mrm` wrote them.

    Raises:
        InputError: the folder holds no such model.
    """
    if not (folder / "mrm.json").exists():
        raise InputError(f"{folder}: no mrm.json: give a folder that `kvjax train mrm` made")
    graph, base, config = hf.load(folder, dtype="float32")
    mrm = MRM(graph, config, str(read_json(folder / "mrm.json").get("head")))
    like = {**mrm.init_head(), "seen": jnp.zeros(config.vocab_size, jnp.float32)}
    head = load_weights(folder / "mrm.safetensors", like)
    seen = np.asarray(head.pop("seen")) > 0
    return mrm, {"base": base, "head": head}, seen
