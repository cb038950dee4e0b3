"""Counting what XLA compiles, so that a promise of compiling nothing can be checked."""

from types import TracebackType

import jax

__all__ = ["CompilationCount"]


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
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1

    def __enter__(self) -> "CompilationCount":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        jax.monitoring.unregister_event_duration_listener(self._listen)
