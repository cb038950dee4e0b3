"""Sorted first: those with the same beginning follow each other, the cache does the rest."""

from kvjax.plan.first_come import FirstCome, Planned, Request

__all__ = ["SortedCome"]


class SortedCome(FirstCome):
    """First come, first served, after the requests that wait have been sorted by their tokens.

    With a cache that gives up what was used least recently this computes about as little as a plan
    does, unless memory is scarce; it is the peer to beat.
    """

    _unsorted = False

    def add(self, request: Request) -> None:
        """Queues a request; see `FirstCome.add`."""
        super().add(request)
        self._unsorted = True

    def plan(self) -> Planned | None:
        """The next call, or None if nothing can be planned before another is accepted."""
        if self._unsorted:
            rows = sorted(self._waiting, key=lambda row: row.request.prompt)
            self._waiting.clear()
            self._waiting.extend(rows)
            self._unsorted = False
        return super().plan()
