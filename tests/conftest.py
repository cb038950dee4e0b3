"""The strictness that every test runs under."""

import os
import tempfile
from pathlib import Path

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same programs are compiled by several tests and workers: once a run is enough.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
CACHE = Path(tempfile.gettempdir()) / f"kvjax-tests-{RUN}"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
