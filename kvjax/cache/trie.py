"""An index from token prefixes to the pages that hold their keys and values.

Host side, plain Python. A node is one full page: the tokens in it, below the node of the page
before. A branch is one sequence: its full pages are nodes, its last page may be partly filled and
is its own until a fork shares it. Because the index is by content, two branches with the same
tokens always share their full pages, however they came to be; with one token a page, the pages
held are exactly the distinct prefixes of the live branches (Saffron-1, section 4.3).

A token's page is indexed when the token is given to `extend`, which its caller must do in the same
order as the device writes: whoever finds a page may then read it in the same step. Where the device
draws tokens that the host learns later, `reserve` gives them room and `settle` says what they were.
"""

import dataclasses
from collections.abc import Sequence

from kvjax.cache.ledger import OutOfPages, PageLedger

__all__ = ["Branch", "Extension", "PrefixTrie"]


@dataclasses.dataclass(eq=False, slots=True)
class _Node:
    parent: "_Node | None"
    key: tuple[int, ...]
    page: int
    children: dict[tuple[int, ...], "_Node"] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False, slots=True)
class Branch:
    """One sequence: its tokens and the pages that hold them, in order. Read it, do not write it.

    Pages beyond those of its tokens were reserved for tokens to come.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    _nodes: list[_Node] = dataclasses.field(default_factory=list)  # one per full page, until
    _private: bool = False  # a page has a twin: from there on its pages are its own

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Extension:
    """What an `extend` asks of the device.

    Attributes:
        matched: how many of the new tokens, from the first on, are in other branches' pages,
            where their keys and values already are: there is no need to write them.
        copies: (source, target) pages to copy before anything is written.
    """

    matched: int
    copies: tuple[tuple[int, int], ...]


class PrefixTrie:
    """Shares pages between sequences with equal beginnings; holds its references in a ledger.

    Attributes:
        share: False: nothing is indexed or found from now on, every sequence has its own pages.

    >>> trie = PrefixTrie(PageLedger(num_pages=8), page_size=2)
    >>> a, b = trie.insert([1, 2, 3, 4]), trie.insert([1, 2, 5, 6])
    >>> a.pages, b.pages
    ([0, 1], [0, 2])
    """

    def __init__(self, ledger: PageLedger, page_size: int) -> None:
        self.ledger = ledger
        self.page_size = page_size
        self.share: bool = True
        self._root = _Node(None, (), -1)
        self._node_of: dict[int, _Node] = {}
        ledger.on_evict = self._forget

    def match(self, branch: Branch, tokens: Sequence[int]) -> int:
        """Extends a branch by the indexed pages that continue it.

        Returns:
            How many of `tokens` were found: whole pages, and only if the branch ends with one.
        """
        if not self.share or len(branch.pages) * self.page_size != len(branch) or branch._private:
            return 0
        nodes = self._walk(branch._nodes[-1] if branch._nodes else self._root, tokens)
        pages, found = [node.page for node in nodes], len(nodes) * self.page_size
        self.ledger.hold(pages)
        branch._nodes.extend(nodes)
        branch.tokens.extend(tokens[:found])
        branch.pages.extend(pages)
        return found

    def found(self, tokens: Sequence[int]) -> int:
        """How many of the tokens of a new sequence `match` would find."""
        return len(self._walk(self._root, tokens)) * self.page_size if self.share else 0

    def _walk(self, node: _Node, tokens: Sequence[int]) -> list[_Node]:
        """The indexed pages that go on from a node."""
        size = self.page_size
        nodes: list[_Node] = []
        for start in range(0, len(tokens) - size + 1, size):
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            nodes.append(child)
            node = child
        return nodes

    def insert(self, tokens: Sequence[int]) -> Branch:
        """A new branch that holds `tokens`.

        Raises:
            OutOfPages: nothing was taken.
        """
        branch = Branch()
        self.extend(branch, tokens)
        return branch

    def fork(self, branch: Branch) -> Branch:
        """A second branch with the same tokens and pages, a partly filled last one included."""
        pages = branch.pages[: -(-len(branch) // self.page_size)]
        self.ledger.hold(pages)
        return Branch(list(branch.tokens), pages, list(branch._nodes), branch._private)

    def extend(self, branch: Branch, tokens: Sequence[int]) -> Extension:
        """Appends tokens, in shared pages where they are indexed, else in new ones.

        Only the pages from `len(branch) // page_size` on change.

        Raises:
            OutOfPages: the branch is as it was.
        """
        length = len(branch)
        matched = self.match(branch, tokens)
        try:
            copies = self._make_room(branch, len(tokens) - matched)
        except OutOfPages:
            self.truncate(branch, length)
            raise
        branch.tokens.extend(tokens[matched:])
        for depth in self._unindexed(branch):
            if not self._index(branch, depth):
                self._adopt(branch, depth)
                matched = (depth + 1) * self.page_size - length
        if copies and copies[0][1] != branch.pages[length // self.page_size]:
            copies = ()  # the filled page had a twin: the copy's page is free again
        return Extension(matched, copies)

    def reserve(self, branch: Branch, n: int) -> tuple[tuple[int, int], ...]:
        """Makes room for `n` tokens after its last, whatever they will be; says what to copy.

        Raises:
            OutOfPages: the branch is as it was.
        """
        return self._make_room(branch, n)

    def settle(self, branch: Branch, tokens: Sequence[int]) -> None:
        """Says which tokens were written where `reserve` made room.

        Their pages stay where they are: one that turns out to have a twin is not indexed, nor is
        what follows it.
        """
        branch.tokens.extend(tokens)
        if len(branch.pages) * self.page_size < len(branch):
            raise ValueError(f"{len(branch)} tokens in {len(branch.pages)} pages: reserve first")
        for depth in self._unindexed(branch):
            if not self._index(branch, depth):
                branch._private = True
                break

    def truncate(self, branch: Branch, length: int) -> None:
        """Forgets the tokens from `length` on and gives up the pages beyond."""
        if not 0 <= length <= len(branch):
            raise ValueError(f"{length=} is outside of the branch's {len(branch)} tokens")
        pages = -(-length // self.page_size)
        self.ledger.release(branch.pages[pages:])
        del branch.tokens[length:], branch.pages[pages:]
        del branch._nodes[length // self.page_size :]
        branch._private = branch._private and len(branch._nodes) < length // self.page_size

    def release(self, branch: Branch) -> None:
        """Gives up a branch and all its pages; full ones stay findable until they are needed."""
        self.truncate(branch, 0)

    def _make_room(self, branch: Branch, n: int) -> tuple[tuple[int, int], ...]:
        """Takes pages for n more tokens; the last page is copied unless only we can see it."""
        if n == 0:
            return ()
        last = len(branch) // self.page_size  # the entry of the partly filled page, if there is one
        partial = len(branch) % self.page_size > 0
        shared = partial and not self._is_private(branch.pages[last])
        new = max(0, -(-(len(branch) + n) // self.page_size) - len(branch.pages))
        pages = self.ledger.take(new + shared)
        copies: tuple[tuple[int, int], ...] = ()
        if shared:
            copies = ((branch.pages[last], pages[0]),)
            self.ledger.release([branch.pages[last]])
            branch.pages[last] = pages[0]
        branch.pages.extend(pages[shared:])
        return copies

    def _is_private(self, page: int) -> bool:
        return self.ledger.count(page) == 1 and page not in self._node_of

    def _unindexed(self, branch: Branch) -> range:
        """The full pages of a branch that have no node yet."""
        full = len(branch) // self.page_size
        return range(full if not self.share or branch._private else len(branch._nodes), full)

    def _parent_and_key(self, branch: Branch, depth: int) -> tuple[_Node, tuple[int, ...]]:
        start = depth * self.page_size
        key = tuple(branch.tokens[start : start + self.page_size])
        return branch._nodes[-1] if branch._nodes else self._root, key

    def _index(self, branch: Branch, depth: int) -> bool:
        """Makes a page that has become full findable, unless it has a twin."""
        parent, key = self._parent_and_key(branch, depth)
        if key in parent.children:
            return False
        node = _Node(parent, key, branch.pages[depth])
        parent.children[key] = self._node_of[node.page] = node
        self.ledger.index(node.page)
        branch._nodes.append(node)
        return True

    def _adopt(self, branch: Branch, depth: int) -> None:
        """Takes the twin of a page instead of it."""
        parent, key = self._parent_and_key(branch, depth)
        twin = parent.children[key]
        self.ledger.hold([twin.page])
        self.ledger.release([branch.pages[depth]])
        branch.pages[depth] = twin.page
        branch._nodes.append(twin)

    def _forget(self, page: int) -> None:
        # Whoever holds a page holds those before it, and `release` lets go of the last first: an
        # evicted page is always a leaf.
        node = self._node_of.pop(page)
        assert node.parent is not None and not node.children
        del node.parent.children[node.key]
