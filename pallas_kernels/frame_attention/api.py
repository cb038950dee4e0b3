"""The contract of `frame_attention`."""

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.frame_attention.reference import frame_attention_reference

__all__ = ["frame_attention"]

Array = jax.Array


def frame_attention(
    q: Array,
    k: Array,
    v: Array,
    ring_k: Array | None = None,
    ring_v: Array | None = None,
    *,
    length: Array | int = 0,
    mask: Array | None = None,
    scale: float | None = None,
    finite: bool = False,
    implementation: str | None = None,
) -> Array:
    """Attention of new frames to cached frames and to each other, at every place by itself.

    These are very many very short attentions (for a video of 256 pixels 4096 a layer and row, of 8
    queries and 33 keys). The cached keys and values lie as they are read, place by place and head
    by head, and are read where they lie: they are never put in one array with the new ones.

    Args:
        q: [B, S, H, T, D] queries of T new frames at S places.
        k: [B, S, H, T, D] keys of the new frames.
        v: [B, S, H, T, D] values of the new frames.
        ring_k: [B, S, H, F, D] keys of cached frames in any order, or None.
        ring_v: [B, S, H, F, D] values of cached frames.
        length: int32 scalar, how many of the F slots are in use, the first ones; every query sees
            those. The others may hold anything, NaN included.
        mask: bool[B or 1, T, T], which new frame (last axis) each new frame sees; None: the causal
            one, itself and those before it.
        scale: of the scores; None: D ** -0.5.
        finite: the caller knows that unused slots of ring_v hold finite numbers, such as the zeros
            of an empty ring; this saves a pass over the values.
        implementation: "reference", or None for the best that the default device can run.

    Returns:
        [B, S, H, T, D] in q's dtype. Differentiable in all floating-point arguments.

    Raises:
        ValueError: shapes do not fit each other.
        NotImplementedError: no such implementation here.
    """
    if q.ndim != 5 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"{q.shape=}, {k.shape=} and {v.shape=}: give three of one [B, S, H, T, D]"
        )
    if (ring_k is None) != (ring_v is None):
        raise ValueError("give ring_k and ring_v, or neither")
    if ring_k is not None and ring_v is not None:
        expected = (*q.shape[:3], ring_k.shape[3], q.shape[4])
        if ring_k.shape != expected or ring_v.shape != expected:
            raise ValueError(f"{ring_k.shape=} and {ring_v.shape=} do not fit {q.shape=}")
    frames = q.shape[3]
    if mask is None:
        mask = jnp.tril(jnp.ones((1, frames, frames), bool))
    if mask.shape[1:] != (frames, frames) or mask.shape[0] not in (1, q.shape[0]):
        raise ValueError(f"{mask.shape=} does not fit {q.shape=}")
    if implementation not in (None, "reference"):
        raise NotImplementedError(f"frame_attention has no {implementation=}")
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    return frame_attention_reference(q, k, v, ring_k, ring_v, length, mask, scale, finite)
