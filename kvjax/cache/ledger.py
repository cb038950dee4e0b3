"""The owner of every page: reference counts, the free list, and pages kept in case they return.

Host side, plain Python. Every page is in exactly one of three states:

    held     somebody refers to it (count > 0)
    kept     nobody does, but an index can still find its tokens; least recently used goes first
    free     nobody does and nobody can
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

__all__ = ["OutOfPages", "PageLedger"]


class OutOfPages(RuntimeError):
    """More pages were asked for than are free or kept: admit less, or release something first."""


class PageLedger:
    """Counts references to `num_pages` pages.

    >>> ledger = PageLedger(num_pages=4)
    >>> pages = ledger.take(2)
    >>> ledger.hold(pages)      # a second owner
    >>> ledger.release(pages)
    >>> ledger.available, ledger.held
    (2, 2)
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.on_evict: Callable[[int], None] | None = None
        self.peak: int = 0
        self._count = [0] * num_pages
        self._indexed = [False] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the lowest page goes first
        self._kept: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Pages that somebody refers to."""
        return self.num_pages - self.available

    def count(self, page: int) -> int:
        """How many references a page has."""
        return self._count[page]

    def take(self, n: int) -> list[int]:
        """Gives `n` pages with one reference each, evicting kept ones if no others are left.

        Raises:
            OutOfPages: fewer than `n` are available; nothing was taken.
        """
        if n > self.available:
            raise OutOfPages(f"asked for {n} pages, {self.available} of {self.num_pages} available")
        while len(self._free) < n:
            self._evict_oldest()
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._count[page] = 1
        self.peak = max(self.peak, self.held)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Adds a reference to pages that are held or kept."""
        for page in pages:
            if self._count[page] == 0:
                if page not in self._kept:
                    raise ValueError(f"page {page} is free: nobody may hold it before `take`")
                del self._kept[page]
            self._count[page] += 1
        self.peak = max(self.peak, self.held)

    def release(self, pages: Iterable[int]) -> None:
        """Gives up a reference to each page; give a row's pages in order.

        They are released from the last to the first, so that of a prefix and its continuation the
        continuation is evicted first.
        """
        for page in reversed(list(pages)):
            if self._count[page] == 0:
                raise ValueError(f"page {page} was released more often than it was held")
            self._count[page] -= 1
            if self._count[page] == 0:
                if self._indexed[page]:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def index(self, page: int) -> None:
        """Marks a held page as findable: when its last owner leaves, it is kept, not free."""
        if self._count[page] == 0:
            raise ValueError(f"page {page} has no owner: only a held page can be indexed")
        self._indexed[page] = True

    def unindex(self, page: int) -> None:
        """Takes the mark back; a page that was only kept becomes free."""
        self._indexed[page] = False
        if page in self._kept:
            del self._kept[page]
            self._free.append(page)

    def _evict_oldest(self) -> None:
        page = next(iter(self._kept))
        if self.on_evict is not None:
            self.on_evict(page)  # may unindex this page and others
        self.unindex(page)
