"""StreamingLLM (Xiao et al. 2023): the first tokens and the last."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.select.scorer import Scorer
from kvjax.select.view import View

__all__ = ["StreamingLLM"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(Scorer):
    """Keeps `sinks` first tokens, which draw attention whatever they say, and the last ones."""

    sinks: int = 4

    def scores(self, view: View) -> jax.Array:
        """A token's place: the later, the better."""
        return jnp.broadcast_to(view.slot.astype(jnp.float32), view.shape)
