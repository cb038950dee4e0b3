"""The oracle: a scatter that drops what has nowhere to go."""

import jax
import jax.numpy as jnp

__all__ = ["page_write_reference"]

Array = jax.Array


def page_write_reference(
    k_pages: Array, v_pages: Array, layer: Array, k: Array, v: Array, page: Array, offset: Array
) -> tuple[Array, Array]:
    """See `api.page_write`."""
    inner = layer % k_pages.shape[1]

    def scatter(pages: Array, new: Array) -> Array:
        t, heads, d = new.shape
        per_page = pages.shape[2]
        new = jnp.swapaxes(new.reshape(t, heads // per_page, per_page, d), 0, 1)
        return pages.at[page, inner, :, offset].set(new.astype(pages.dtype), mode="drop")

    return scatter(k_pages, k), scatter(v_pages, v)
