"""What XLA compiles: counted, forbidden where nothing should be, and kept for the next time."""

import os
import threading
from pathlib import Path
from types import TracebackType

import jax
import platformdirs

__all__ = ["CompilationCount", "NoCompilation", "UnexpectedCompilation", "keep_compilations"]

_EVENT = "/jax/core/compile/backend_compile_duration"


class UnexpectedCompilation(RuntimeError):
    """Something was compiled where everything should have been compiled before."""


class CompilationCount:
    """Counts the programs compiled, by anybody, while the context is open.

    >>> with CompilationCount() as compiled:
    ...     pass
    >>> compiled.count
    0
    """

    def __init__(self) -> None:
        self.count: int = 0

    def _listen(self, event: str, duration_secs: float, **_: object) -> None:
        if event == _EVENT:
            self.count += 1

    def __enter__(self) -> "CompilationCount":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        jax.monitoring.unregister_event_duration_listener(self._listen)


class NoCompilation(CompilationCount):
    """Raises where this thread compiles anything while the context is open.

    Raises:
        UnexpectedCompilation: from inside of what was compiled.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def _listen(self, event: str, duration_secs: float, **details: object) -> None:
        if event == _EVENT and threading.get_ident() == self._thread:
            raise UnexpectedCompilation(
                f"a program was compiled after the warm-up ({duration_secs:.1f} s): {details}"
            )


def keep_compilations() -> Path | None:
    """Keeps compiled programs in the user's cache folder, so that the next start finds them.

    A folder that JAX has been given before (`jax_compilation_cache_dir`) is left alone.
    KVJAX_COMPILATION_CACHE names another folder, or switches this off by "off".

    Returns:
        The folder, or None if nothing is kept.
    """
    given = jax.config.values["jax_compilation_cache_dir"]
    if given:
        return Path(given)
    asked = os.environ.get("KVJAX_COMPILATION_CACHE", "")
    if asked.lower() == "off":
        return None
    folder = Path(asked or platformdirs.user_cache_path("kvjax")) / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # a home that cannot be written is no reason to answer nothing
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder
