"""Kernels: one folder each, with a contract (api.py) and a plain-JAX reference that is the oracle.

Nothing here imports the rest of kvjax.
"""
