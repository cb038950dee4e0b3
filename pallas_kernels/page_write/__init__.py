"""New keys and values into their pages."""

from kvjax.pallas_kernels.page_write.api import page_write

__all__ = ["page_write"]
