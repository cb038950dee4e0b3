"""A network inside one process: every message counted, and delayed as a given one would.

A message that is handed over at time t leaves when those before it on the same way have left, takes
its bytes over the rate, and arrives the one-way delay later.
"""

import threading
import time
from typing import Any

from kvjax.infer.private._party.engine import load_spu

__all__ = ["Network", "shaped_contexts"]


class Network:
    """What all parties of one process share: the messages on their way, and the counts.

    Args:
        delay: seconds one way.
        rate: bits a second each way between two parties; 0 is without a bound.
    """

    def __init__(self, delay: float, rate: float) -> None:
        self.delay, self.rate = delay, rate
        self.condition = threading.Condition()
        self.messages: dict[tuple[int, int, str], tuple[float, bytes]] = {}
        self.free_at: dict[tuple[int, int], float] = {}
        self.bytes: dict[int, int] = {}
        self.count: dict[int, int] = {}

    def put(self, source: int, to: int, key: str, data: bytes) -> None:
        """Takes a message."""
        with self.condition:
            start = max(time.monotonic(), self.free_at.get((source, to), 0.0))
            leaves = start + (8 * len(data) / self.rate if self.rate else 0.0)
            self.free_at[source, to] = leaves
            self.bytes[source] = self.bytes.get(source, 0) + len(data)
            self.count[source] = self.count.get(source, 0) + 1
            self.messages[source, to, key] = (leaves + self.delay, data)
            self.condition.notify_all()

    def totals(self, rank: int) -> dict[str, int]:
        """Bytes and messages that a party has sent so far."""
        with self.condition:
            return {"bytes": self.bytes.get(rank, 0), "messages": self.count.get(rank, 0)}

    def get(self, source: int, to: int, key: str, timeout: float) -> bytes:
        """Waits for a message until it has arrived."""
        with self.condition:
            name = (source, to, key)
            if not self.condition.wait_for(lambda: name in self.messages, timeout):
                raise TimeoutError(f"no message {key} from party {source} in {timeout:.0f} s")
            arrives, data = self.messages.pop(name)
        time.sleep(max(0.0, arrives - time.monotonic()))
        return data


def shaped_contexts(network: Network, size: int, timeout: float) -> list[Any]:
    """The engine's link contexts of all parties over one `Network`, one a thread."""
    link = load_spu()[0].link
    made: list[Any] = [None] * size

    def make(rank: int) -> None:
        desc = link.Desc()
        for other in range(size):
            desc.add_party(f"party{other}", f"thread{other}")
        channels = [_channel(network, rank, other, timeout) for other in range(size)]
        made[rank] = link.create_with_channels(desc, rank, channels)

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def _channel(network: Network, rank: int, other: int, timeout: float) -> Any:
    """One party's way to another, as the engine wants it."""
    base = load_spu()[0].link.IChannel

    class Channel(base):
        def send(self, key: str, data: bytes) -> None:
            network.put(rank, other, key, bytes(data))

        send_async = send_async_throttled = send

        def recv(self, key: str) -> bytes:
            return network.get(other, rank, key, timeout)

        def set_chunk_parallel_send_size(self, size: int) -> None: ...

        def set_throttle_window_size(self, size: int) -> None: ...

        def wait_link_task_finish(self) -> None: ...

        def test_send(self, timeout: int) -> None: ...

        def test_recv(self) -> None: ...

        def abort(self) -> None: ...

        Send, SendAsync, SendAsyncThrottled, Recv = send, send_async, send_async_throttled, recv
        SetChunkParallelSendSize, SetThrottleWindowSize = (
            set_chunk_parallel_send_size,
            set_throttle_window_size,
        )
        WaitLinkTaskFinish, TestSend, TestRecv, Abort = (
            wait_link_task_finish,
            test_send,
            test_recv,
            abort,
        )

    return Channel()
