"""The `attend`s: what a decoder's layers may be given to attend with."""

import jax

from kvjax.cache.pool import KVPool, write
from kvjax.cache.table import Slots
from kvjax.models.decoder import Attend
from kvjax.pallas_kernels.page_attention import WorkList, page_attention
from kvjax.pallas_kernels.prefill_attention import prefill_attention

__all__ = ["causal_attend", "paged_attend"]

Array = jax.Array


def causal_attend(windows: Array | int | None = None) -> Attend:
    """Attention of whole sequences to themselves, for training and for scoring without a cache.

    See `prefill_attention` for what runs where.

    Args:
        windows: int32[L] from `DecoderConfig.layer_windows`, or one window for all layers, which
            costs a CUDA device less than an array; 0 and None are no window.

    Returns:
        An `attend` for q [B, T, H, D] and k, v [B, T, K, D] whose state passes through untouched.
    """

    def attend(layer: Array, q: Array, k: Array, v: Array, state: object) -> tuple[Array, object]:
        window = 0 if windows is None else windows
        if not isinstance(window, int):
            window = window[layer]
        return prefill_attention(q, k, v, window=window)[0], state

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
