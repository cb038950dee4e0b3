"""The strictness that every test runs under."""

import gc
import os
import tempfile
from pathlib import Path

import pytest

# The same programs are compiled by several tests, workers and processes: once a run is enough.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"kvjax-tests-{RUN}")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def forgotten():
    """Lets go of a module's programs: hundreds take gigabytes and slow the collector."""
    yield
    jax.clear_caches()
    gc.collect()
