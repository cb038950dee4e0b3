"""Whether the other parties are there: asked every second, so that nobody waits for the dead."""

import socket
import threading
import time
from collections.abc import Callable, Sequence

__all__ = ["Watch"]


class Watch(threading.Thread):
    """Knocks at the other parties' addresses; one that stays shut ends this party.

    Before all are linked an address has `timeout` seconds to open, afterwards a fourth of that to
    open again: a process that ended closes its address at once.

    Args:
        addresses: of all parties, host:port.
        rank: of this one.
        timeout: seconds.
        fail: is told the error; does not return.
    """

    def __init__(
        self, addresses: Sequence[str], rank: int, timeout: float, fail: Callable[[Exception], None]
    ) -> None:
        super().__init__(daemon=True)
        self.others = [(i, address) for i, address in enumerate(addresses) if i != rank]
        self.timeout, self.fail = timeout, fail
        self.linked, self.over = threading.Event(), threading.Event()

    def run(self) -> None:
        """Until `over` is set."""
        seen = dict.fromkeys((i for i, _ in self.others), time.monotonic())
        begin = time.monotonic()
        while not self.over.wait(1.0):
            for i, address in self.others:
                now = time.monotonic()
                if _opens(address):
                    seen[i] = now
                    continue
                linked = self.linked.is_set()
                patience = self.timeout / 4 if linked else self.timeout
                if now - seen[i] > patience and not self.over.is_set():
                    how = "is gone" if linked else "cannot be reached"
                    self.fail(ConnectionError(f"party {i} at {address} {how}"))
            if not self.linked.is_set() and time.monotonic() - begin > self.timeout + 5:
                self.fail(ConnectionError("the parties reach each other but do not link: see TLS"))


def _opens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except OSError:
        return False
    return True
