"""Reads the engine's own counters out of its log: there is no other way to them."""

import re
from pathlib import Path
from typing import Any

__all__ = ["Log"]

_START = re.compile(r"\[Profiling\] SPU execution (\S+) completed.*execution took ([\d.e+-]+)s")
_OPERATOR = re.compile(
    r"- (\S+), executed (\d+) times, duration ([\d.e+-]+)s, send bytes (\d+) recv bytes (\d+), "
    r"send actions (\d+), recv actions (\d+)"
)
_TOTAL = re.compile(
    r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+), "
    r"recv actions (\d+)"
)


class Log:
    """One party's log file, read on from where it was read to."""

    def __init__(self, path: Path, spu: Any) -> None:
        self.path, self.place = path, 0
        options = spu.logging.LogOptions()
        options.system_log_path, options.enable_console_logger = str(path), False
        spu.logging.setup_logging(options)

    def new(self) -> list[dict[str, Any]]:
        """The runs that ended since the last call, oldest first.

        Each has `program`, `seconds`, `bytes`, `received`, `actions` (messages that this party
        sent one after the other, so nearly the rounds) and `operators`: name -> [times, bytes,
        actions]. Operators count what lies below them: layers of the engine must not be added.
        """
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", errors="replace") as file:
            file.seek(self.place)
            text = file.read()
            self.place = file.tell()
        runs: list[dict[str, Any]] = []
        for line in text.splitlines():
            if match := _START.search(line):
                runs.append({"program": match[1], "seconds": float(match[2]), "operators": {}})
            elif runs and (match := _OPERATOR.search(line)):
                runs[-1]["operators"][match[1]] = [int(match[2]), int(match[4]), int(match[6])]
            elif runs and (match := _TOTAL.search(line)):
                names = ("bytes", "received", "actions")
                runs[-1].update(zip(names, map(int, match.groups()), strict=False))
        return runs
