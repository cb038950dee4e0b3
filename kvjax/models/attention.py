"""The `attend`s: what a decoder's layers may be given to attend with."""

import jax
import jax.numpy as jnp

from kvjax.cache.pool import KVPool, write
from kvjax.cache.table import Slots
from kvjax.models.decoder import Attend
from kvjax.pallas_kernels.page_attention import WorkList, page_attention

__all__ = ["causal_attend", "paged_attend"]

Array = jax.Array


def causal_attend(windows: Array | None = None) -> Attend:
    """Attention of whole sequences to themselves, for training and for scoring without a cache.

    Args:
        windows: int32[L] from `DecoderConfig.layer_windows`.

    Returns:
        An `attend` for q [B, T, H, D] and k, v [B, T, K, D] whose state passes through untouched.
    """

    def attend(layer: Array, q: Array, k: Array, v: Array, state: object) -> tuple[Array, object]:
        query, key = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None, :]
        seen = key <= query
        if windows is not None:
            window = windows[layer]
            seen &= (window == 0) | (key > query - window)
        # float32 in, float32 through: on accelerators the default would shorten the products.
        precision = "highest" if q.dtype == jnp.float32 else "default"
        # jax.nn's attention mixes dtypes by itself; strict promotion is for our own arithmetic.
        with jax.default_matmul_precision(precision), jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(q, k, v, mask=seen[None, None]), state

    return attend


def paged_attend(slots: Slots, work: WorkList, windows: Array | None = None) -> Attend:
    """Attention through a page pool, which is the state: writes the new tokens, then reads.

    A token's key and value are in their page before anything of the same layer attends, so rows
    of one step may read what another row of it writes.

    Args:
        slots: where the T new tokens go.
        work: who reads what, new tokens included.
        windows: int32[L] from `DecoderConfig.layer_windows`.

    Returns:
        An `attend` for q [T, H, D] and k, v [T, K, D] whose state is a `KVPool`.
    """

    def attend(layer: Array, q: Array, k: Array, v: Array, pool: KVPool) -> tuple[Array, KVPool]:
        pool = write(pool, layer, k, v, slots)
        window = None if windows is None else windows[layer]
        out, _ = page_attention(q, pool, layer, work, window=window)
        return out, pool

    return attend
