"""Expected Attention (Devoto et al. 2025): the attention that queries to come will pay."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.select.scorer import Scorer
from kvjax.select.view import View, by_kv_head

__all__ = ["ExpectedAttention"]

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Scorer):
    """Takes queries to come as Gaussian, like the prompt's own before their rotation.

    A key's score is the expectation of exp(q k / sqrt(D)) over queries at the next `future`
    positions, as a share of all, times the norm of its value.

    Attributes:
        sinks: first tokens, which always stay and are left out of the statistics.
        future: positions over which the rotation is averaged.
        covariance: whether the queries' covariance counts, and not their mean alone.
        value_norm: whether the values' norms count.
        epsilon: added to the shares before the norm; kvpress's default is 0, its authors' 0.02.
    """

    sinks: int = 4
    future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    @property
    def observed(self) -> int:
        """All queries."""
        return -1

    def scores(self, view: View) -> Array:
        """See `Scorer.scores`."""
        layers = jnp.arange(view.shape[0], dtype=jnp.int32)
        return jax.lax.map(lambda layer: self._layer(view, layer), layers)

    def _layer(self, view: View, layer: Array) -> Array:
        mean, covariance = self._statistics(view, layer)
        keys = view.keys(layer)  # [K, B, S, D]
        heads, _, _, d = keys.shape
        wide = jnp.repeat(keys, mean.shape[1] // heads, axis=0)  # [H, B, S, D]
        score = jnp.einsum("hbsd,bhd->hbs", wide, mean, precision="highest") * d**-0.5
        if self.covariance:
            half = jnp.einsum("hbsd,bhde->hbse", wide, covariance, precision="highest")
            score = score + jnp.sum(half * wide, axis=-1) / (2 * d)
        live = (view.live & (view.slot >= self.sinks))[layer]
        live = jnp.repeat(live, mean.shape[1] // heads, axis=0)
        share = jax.nn.softmax(jnp.where(live, score, -jnp.inf), axis=-1)
        share = by_kv_head(share[None], heads)[0]
        if self.value_norm:
            share = (share + self.epsilon) * jnp.linalg.norm(view.values(layer), axis=-1)
        return share

    def _statistics(self, view: View, layer: Array) -> tuple[Array, Array]:
        """Mean [B, H, D] and covariance [B, H, D, D] of the queries at positions to come."""
        if view.inverse_frequencies is None:
            raise ValueError("expected attention needs View.inverse_frequencies")
        frequency, position = view.inverse_frequencies, view.seen.position
        used = (position >= self.sinks).astype(jnp.float32)
        count = jnp.maximum(jnp.sum(used, axis=1), 1.0)[:, None, None]
        q = _rotate(view.seen.q[layer].astype(jnp.float32), -position, frequency)
        mean = jnp.sum(q * used[..., None, None], axis=1) / count
        spread = (q - mean[:, None]) * used[..., None, None]
        covariance = jnp.einsum("bahd,bahe->bhde", spread, spread, precision="highest")
        turn = self._mean_rotation(view.table.position, frequency)
        mean = jnp.einsum("bde,bhe->bhd", turn, mean, precision="highest")
        covariance = jnp.einsum(
            "bde,bhef,bgf->bhdg", turn, covariance / count[..., None], turn, precision="highest"
        )
        return mean, covariance

    def _mean_rotation(self, position: Array, frequency: Array) -> Array:
        """The rotation's mean over the next positions, [B, D, D]."""
        places = position[:, None] + jnp.arange(self.future, dtype=jnp.int32)[None]
        unit = jnp.broadcast_to(
            jnp.eye(2 * frequency.shape[0], dtype=jnp.float32)[None],
            (position.shape[0], 2 * frequency.shape[0], 2 * frequency.shape[0]),
        )

        def one(total: Array, place: Array) -> tuple[Array, None]:
            rows = jnp.broadcast_to(place[:, None], (unit.shape[0], 1))
            return total + _rotate(unit[:, None], rows, frequency)[:, 0], None

        total, _ = jax.lax.scan(one, jnp.zeros_like(unit), places.T)
        return jnp.swapaxes(total / self.future, 1, 2)


def _rotate(x: Array, position: Array, frequency: Array) -> Array:
    """Rotary embedding of x [..., heads, D] at int32[...] positions, in float32."""
    angle = position.astype(jnp.float32)[..., None, None]
    angle = angle * frequency.reshape((1,) * (angle.ndim - 1) + (-1,))
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
