"""The contract of `prefill_attention`."""

import functools
from typing import Literal

import jax

from kvjax.pallas_kernels.devices import fits_cudnn
from kvjax.pallas_kernels.prefill_attention.gpu import prefill_attention_cudnn
from kvjax.pallas_kernels.prefill_attention.mask import Window
from kvjax.pallas_kernels.prefill_attention.reference import prefill_attention_reference
from kvjax.pallas_kernels.prefill_attention.tpu import fits_splash, prefill_attention_splash

__all__ = ["prefill_attention"]

Array = jax.Array


def prefill_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    window: Window = 0,
    scale: float | None = None,
    implementation: Literal["reference", "cudnn", "splash"] | None = None,
) -> tuple[Array, Array]:
    """Causal attention of whole sequences to themselves.

    Gradients flow through the outputs; none should be asked of `lse`, which the kernels of others
    do not differentiate.

    Args:
        q: [B, T, H, D].
        k: [B, T, K, D], H a multiple of K.
        v: [B, T, K, D].
        window: a query sees the last so many positions, itself included; 0: all. An int32 scalar
            may be data, and costs an accelerator a mask.
        scale: of the products; None: D ** -0.5.
        implementation: "reference" is plain XLA; "cudnn" needs CUDA and 16-bit types; "splash"
            needs a TPU, T a multiple of 128 and a static window, and is not split over a mesh.
            None: cuDNN on CUDA where it fits, else the reference. The platform is that for which
            the program is lowered.

    Returns:
        Outputs [B, T, H, D] in q's dtype, and float32[B, T, H], the natural logarithm of each
        softmax's sum.

    Raises:
        NotImplementedError: the named implementation cannot do it.
    """
    rest = window, q.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "splash":
        # A mask that is data would be held whole.
        if not isinstance(window, int) or not fits_splash(q):
            raise NotImplementedError(f"splash attention of q {q.shape} with {window=}")
        return prefill_attention_splash(q, k, v, window, rest[1])
    if implementation == "cudnn":
        if not fits_cudnn(q):
            raise NotImplementedError(f"cuDNN's attention of {q.dtype} q {q.shape}")
        return prefill_attention_cudnn(q, k, v, *rest)
    plain = functools.partial(prefill_attention_reference, window=rest[0], scale=rest[1])
    if implementation == "reference" or not fits_cudnn(q):
        return plain(q, k, v)
    cudnn = functools.partial(prefill_attention_cudnn, window=rest[0], scale=rest[1])
    try:
        return jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=plain)
    except RuntimeError:  # JAX was installed without CUDA, and so cannot even trace it.
        return plain(q, k, v)
