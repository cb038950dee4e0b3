"""Measurements of what kvjax does, made on the device at hand."""

from kvjax.infer.bench.kernels import Case, Timing, kernel_cases, time_kernels

__all__ = ["Case", "Timing", "kernel_cases", "time_kernels"]
