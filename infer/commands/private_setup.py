"""`kvjax private setup`: the environment that the parties of `kvjax private run` live in."""

import dataclasses
from collections.abc import Sequence

from kvjax.infer.commands.shared import parse_arguments
from kvjax.infer.private.environment import setup

__all__ = ["PrivateSetup", "main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivateSetup:
    """Make the environment that the parties run in; a second call does nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parse_arguments(PrivateSetup, "kvjax private setup", argv)
    setup(lambda line: print(line, flush=True))
    return 0
