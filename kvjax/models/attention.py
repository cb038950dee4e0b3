"""The `attend`s: what a decoder's layers may be given to attend with."""

import functools

import jax
import jax.numpy as jnp

from kvjax.cache.pool import KVPool, write
from kvjax.cache.table import Slots
from kvjax.models.decoder import Attend
from kvjax.pallas_kernels.page_attention import WorkList, page_attention

__all__ = ["causal_attend", "paged_attend"]

Array = jax.Array


def causal_attend(windows: Array | int | None = None) -> Attend:
    """Attention of whole sequences to themselves, for training and for scoring without a cache.

    In bfloat16 and float16 a CUDA device runs cuDNN's flash attention, which never holds the square
    of scores; everything else runs XLA's own. The platform decides when the program is lowered.

    Args:
        windows: int32[L] from `DecoderConfig.layer_windows`, or one window for all layers, which
            costs a CUDA device less than an array; 0 and None are no window.

    Returns:
        An `attend` for q [B, T, H, D] and k, v [B, T, K, D] whose state passes through untouched.
    """

    def attend(layer: Array, q: Array, k: Array, v: Array, state: object) -> tuple[Array, object]:
        mask, local = None, None
        if isinstance(windows, int):
            local = (windows - 1, 0) if windows else None
        elif windows is not None:
            mask = _causal_mask(q.shape[1], windows[layer])
        return _attention(q, k, v, mask, local), state

    return attend


def _causal_mask(length: int, window: Array) -> Array:
    """Which keys each query sees: bool[1, 1, T, T]."""
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    return ((key <= query) & ((window == 0) | (key > query - window)))[None, None]


def _attention(
    q: Array, k: Array, v: Array, mask: Array | None, local: tuple[int, int] | None
) -> Array:
    """Attention under a mask, or under the causal one with a window of a static size."""
    attend = functools.partial(
        jax.nn.dot_product_attention, mask=mask, is_causal=mask is None, local_window_size=local
    )

    def xla(q: Array, k: Array, v: Array) -> Array:
        # float32 in, float32 through: on accelerators the default would shorten the products.
        precision = "highest" if q.dtype == jnp.float32 else "default"
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        with jax.default_matmul_precision(precision):
            return attend(*wide, implementation="xla").astype(q.dtype)

    def cudnn(q: Array, k: Array, v: Array) -> Array:
        # jax.nn mixes dtypes there; strict promotion is for our own arithmetic.
        with jax.numpy_dtype_promotion("standard"):
            return attend(q, k, v, implementation="cudnn")

    if not _fits_cudnn(q, mask is not None):
        return xla(q, k, v)
    try:
        return jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=xla)
    except RuntimeError:  # JAX was installed without CUDA, and so cannot even trace it.
        return xla(q, k, v)


def _fits_cudnn(q: Array, masked: bool) -> bool:
    """Whether cuDNN's flash attention takes queries [B, T, H, D], backwards too."""
    size_fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    length_fits = q.shape[1] % 2 == 0 or not masked
    return q.dtype in (jnp.bfloat16, jnp.float16) and size_fits and length_fits


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
