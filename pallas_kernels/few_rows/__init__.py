"""Products of so few rows that reading the weights is what takes the time."""

from kvjax.pallas_kernels.few_rows.api import gated_product, product

__all__ = ["gated_product", "product"]
