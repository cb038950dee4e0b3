"""How much of the time a device waits: read from a profile of JAX."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["busy_and_span", "device_times"]


def device_times(folder: Path) -> list[tuple[float, float]]:
    """Begin and end, in microseconds, of everything that ran on the first device.

    Args:
        folder: as given to `jax.profiler.start_trace`.

    Raises:
        ValueError: the profile shows no device.
    """
    (file,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    with gzip.open(file) as stream:
        events: list[dict[str, Any]] = json.load(stream)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    devices = sorted(pid for pid, name in names.items() if "/device:" in name)
    if not devices:
        raise ValueError(f"{folder}: the profile shows no device, only {sorted(names.values())}")
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"
    }
    return [
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("ph") == "X"
        and e["pid"] == devices[0]
        # Beside the streams a profile has rows that sum them up.
        and "Stream" in threads.get((e["pid"], e["tid"]), "")
    ]


def busy_and_span(times: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """How long anything ran, and from the first begin to the last end.

    >>> busy_and_span([(0.0, 2.0), (1.0, 3.0), (4.0, 5.0)])
    (4.0, 5.0)
    """
    ordered = sorted(times)
    busy, reached = 0.0, ordered[0][0]
    for begin, end in ordered:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy, reached - ordered[0][0]
