"""Packages that only the parity tests need (the `parity` extra)."""

import importlib
import os
import warnings
from types import ModuleType

import pytest


def required(name: str) -> ModuleType:
    """The package, or a skip, or a failure where the parity tests are required."""
    try:
        with warnings.catch_warnings():
            # Both packages use what Python deprecates, while they are imported.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("KVJAX_REQUIRE_PARITY") == "1":
            pytest.fail(f"KVJAX_REQUIRE_PARITY=1, but {name} cannot be imported: {error}")
        message = f"{name} is not installed (pip install kvjax[parity])"
        pytest.skip(message, allow_module_level=True)
