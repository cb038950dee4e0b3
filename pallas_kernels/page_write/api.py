"""The contract of `page_write`."""

import jax

from kvjax.pallas_kernels.devices import default_device
from kvjax.pallas_kernels.page_write.reference import page_write_reference
from kvjax.pallas_kernels.page_write.tpu import page_write_tpu

__all__ = ["page_write"]

Array = jax.Array


def page_write(
    k_pages: Array,
    v_pages: Array,
    layer: Array,
    k: Array,
    v: Array,
    page: Array,
    offset: Array,
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Writes one layer's keys and values of T tokens into a pool, in place if it is donated.

    Args:
        k_pages: [N, R, C, P, D].
        v_pages: [N, R, C, P, D].
        layer: int32 scalar of L; the page's own layer is `layer % R`.
        k: [T, K, D], cast to the pool's dtype.
        v: [T, K, D].
        page: int32[K/C, T], the page of each token in each head group; N or above is dropped.
        offset: int32[K/C, T], the token's place in its page.
        implementation: "reference", "tpu", or None for the best that the default device can run.

    Returns:
        The two pools.

    Raises:
        ValueError: shapes do not fit each other.
        NotImplementedError: no such implementation here, or it cannot do this.
    """
    heads = page.shape[0] * k_pages.shape[2]
    if k.shape != (page.shape[1], heads, k_pages.shape[-1]) or v.shape != k.shape:
        raise ValueError(f"{k.shape=} {v.shape=} do not fit {k_pages.shape=} {page.shape=}")
    if implementation not in (None, "reference", "tpu"):
        raise NotImplementedError(f"page_write has no {implementation=}")
    best = "tpu" if default_device().platform == "tpu" else "reference"
    if (implementation or best) == "tpu":
        try:
            return page_write_tpu(k_pages, v_pages, layer, k, v, page, offset)
        except NotImplementedError:
            if implementation is not None:
                raise
    return page_write_reference(k_pages, v_pages, layer, k, v, page, offset)
