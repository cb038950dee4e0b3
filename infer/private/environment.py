"""The parties' own environment: SecretFlow SPU and what its Python needs, pinned.

SPU's wheels pin one old JAX. Its native part needs none, so the wheel is installed without what it
asks for, into an environment by itself; see `kvjax.infer.private._party`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import platformdirs

from kvjax.errors import InputError

__all__ = ["PINNED", "environment_folder", "party_command", "party_python", "setup"]

PINNED = ("spu==0.10.0.dev20251211", "numpy==2.4.6", "cachetools==6.2.2")
"""The wheel, for Python 3.11 and 3.12 on Linux, and all that `spu.api` imports."""
_VARIABLE = "KVJAX_PRIVATE_ENVIRONMENT"
# The parties' folder is found under its own name without the packages above it, which want JAX.
_START = """
import runpy, sys, types
for name in ("kvjax", "kvjax.infer", "kvjax.infer.private"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
sys.modules["kvjax.infer.private"].__path__ = [sys.argv.pop(1)]
runpy.run_module("kvjax.infer.private._party", run_name="__main__", alter_sys=True)
"""


def environment_folder() -> Path:
    """Where the environment is: in the user's cache, or where KVJAX_PRIVATE_ENVIRONMENT says.

    Its name holds the pins and the Python, so that a changed pin makes a new one.
    """
    if given := os.environ.get(_VARIABLE):
        return Path(given)
    pins = hashlib.sha256(" ".join(PINNED).encode()).hexdigest()[:8]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Path(platformdirs.user_cache_dir("kvjax")) / f"private-py{version}-{pins}"


def party_python() -> Path:
    """The environment's Python.

    Raises:
        InputError: where it was not set up.
    """
    python = environment_folder() / "bin" / "python"
    if not (environment_folder() / "ready").exists():
        raise InputError(f"{environment_folder()}: no environment: run `kvjax private setup` first")
    return python


def setup(say: Callable[[str], None]) -> Path:
    """Makes the environment; does nothing where it is there.

    Raises:
        InputError: where the wheel cannot be had or does not run, with pip's reason.
    """
    folder = environment_folder()
    if (folder / "ready").exists():
        say(f"{folder}: is set up")
        return folder
    say(f"{folder}: making the environment ({', '.join(PINNED)})")
    shutil.rmtree(folder, ignore_errors=True)  # half of one is none
    _run([sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    _run([python, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", *PINNED])
    _run([*party_command(python), "--check"])
    (folder / "ready").write_text("\n".join(PINNED) + "\n")
    say(f"{folder}: is set up")
    return folder


def party_command(python: str | Path) -> list[str]:
    """What starts a party; its arguments are to follow."""
    return [str(python), "-c", _START, str(Path(__file__).parent)]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        why = next((line for line in lines if "ERROR" in line), lines[-1] if lines else "no reason")
        raise InputError(f"private setup: {' '.join(command[1:4])} failed: {why.strip()}")
