"""PageLedger and PrefixTrie against a model: token lists, and pages that are token lists too."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvjax.cache import Branch, OutOfPages, PageLedger, PrefixTrie

pytestmark = pytest.mark.slow

# Two tokens only, and short runs, so that sequences meet again and again.
TOKENS = st.lists(st.integers(0, 1), max_size=6)
SOME_TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=6)
UNKNOWN = None  # what a slot holds that nobody has written


class RecordingLedger(PageLedger):
    """Remembers which pages a step took: what they held before is worth nothing."""

    def __init__(self, num_pages):
        super().__init__(num_pages)
        self.taken = []

    def take(self, n):
        pages = super().take(n)
        self.taken += pages
        return pages


def distinct_prefixes(sequences):
    return {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: B905


class TrieMachine(RuleBasedStateMachine):
    """Branches come, grow, part, shrink and go; a step extends several of them at once.

    `pages` are the device's pages as token lists. A step does there what the device does: it reads
    the sources of all copies, then writes the copies, then the new tokens.
    """

    branches = Bundle("branches")

    @initialize(
        target=branches,
        page_size=st.sampled_from([1, 2, 4]),
        num_pages=st.sampled_from([4, 8, 32]),
    )
    def start(self, page_size, num_pages):
        self.size = page_size
        self.ledger = RecordingLedger(num_pages)
        self.trie = PrefixTrie(self.ledger, page_size)
        self.pages = [[UNKNOWN] * page_size for _ in range(num_pages)]
        self.model = {}  # Branch -> its tokens
        self.seen = []
        return self.insert([])

    # What the device does.

    def write_step(self, copies, writes):
        assert len({target for _, target in copies}) == len(copies), "targets must be distinct"
        sources = [list(self.pages[source]) for source, _ in copies]
        for page in self.ledger.taken:
            self.pages[page] = [UNKNOWN] * self.size
        for (_, target), content in zip(copies, sources, strict=True):
            self.pages[target] = content
        for branch, start in writes:
            for i in range(start, len(branch)):
                self.write_token(branch, i)
        self.ledger.taken = []

    def write_token(self, branch, i):
        page = branch.pages[i // self.size]
        old, new = self.pages[page][i % self.size], branch.tokens[i]
        if old != new:  # writing what is there already changes nothing for others
            owners = [b for b in self.model if page in b.pages]
            # Others may have joined in this step, if they bring the same token.
            assert all(b.tokens[i : i + 1] == [new] for b in owners), "a shared page is written"
            self.pages[page][i % self.size] = new

    # What the host asks for.

    @rule(target=branches, tokens=TOKENS)
    def insert(self, tokens):
        before = self.snapshot()
        try:
            branch = self.trie.insert(tokens)
        except OutOfPages:
            assert self.snapshot() == before
            assert math.ceil(len(tokens) / self.size) > before[1]
            branch, tokens = self.trie.insert([]), []
        self.model[branch] = list(tokens)
        self.seen.append(list(tokens))
        self.write_step([], [(branch, 0)])
        return branch

    @rule(target=branches, branch=branches)
    def fork(self, branch):
        held = self.ledger.held
        twin = self.trie.fork(branch)
        assert twin.pages == branch.pages and self.ledger.held == held
        self.model[twin] = list(self.model[branch])
        return twin

    @rule(
        branch=branches,
        tokens=SOME_TOKENS,
        others=st.lists(st.tuples(branches, SOME_TOKENS), max_size=3),
    )
    def extend(self, branch, tokens, others):
        self.extend_all({id(b): (b, t) for b, t in [*others, (branch, tokens)]}.values())

    @rule(parent=branches, tokens=st.lists(SOME_TOKENS, min_size=1, max_size=4))
    def search(self, parent, tokens):
        """A branch has children, which go on in one step, and ends."""
        children = [self.trie.fork(parent) for _ in tokens]
        self.model |= {child: list(self.model[parent]) for child in children}
        self.extend_all(zip(children, tokens, strict=True))
        for child in children[1:]:
            del self.model[child]
            self.trie.release(child)

    def extend_all(self, work):
        copies, writes = [], []
        for branch, tokens in work:
            length, before = len(branch), self.snapshot()
            try:
                extension = self.trie.extend(branch, tokens)
            except OutOfPages:
                assert self.snapshot() == before
                most = math.ceil((length + len(tokens)) / self.size) - length // self.size
                assert most > before[1]
                continue
            self.model[branch] += tokens
            self.seen.append(list(self.model[branch]))
            # What is found ends with a page; it may begin within one, whose twin was found.
            assert not extension.matched or (length + extension.matched) % self.size == 0
            copies += extension.copies
            writes.append((branch, length + extension.matched))
        self.write_step(copies, writes)

    @rule(branch=branches, tokens=TOKENS)
    def match(self, branch, tokens):
        whole = [*self.model[branch], *tokens]
        live = max(common(whole, other) for other in self.model.values())
        live = max(0, live - live % self.size - len(branch))
        free = len(branch) % self.size == 0
        found = self.trie.match(branch, tokens)
        assert found % self.size == 0
        assert found >= live if free else found == 0
        self.model[branch] += tokens[:found]

    @rule(branch=branches, drop=st.integers(0, 6))
    def truncate(self, branch, drop):
        for outside in (-1, len(branch) + 1):
            with pytest.raises(ValueError, match="outside"):
                self.trie.truncate(branch, outside)
        length = max(0, len(branch) - drop)
        keep = math.ceil(length / self.size)
        kept, beyond = branch.pages[:keep], branch.pages[keep:]
        before = self.counts()
        self.trie.truncate(branch, length)
        assert branch.pages == kept
        assert before - self.counts() == Counter(beyond)
        self.model[branch] = self.model[branch][:length]

    @rule(branch=branches, drop=st.integers(1, 3), tokens=SOME_TOKENS)
    def replace(self, branch, drop, tokens):
        """The last tokens give way to others, as when a guess is rejected."""
        self.truncate(branch, drop)
        self.extend_all([(branch, tokens)])

    @rule(branch=consumes(branches))
    def release(self, branch):
        del self.model[branch]
        self.trie.release(branch)
        assert not branch.pages and not branch.tokens

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def find_again(self, data):
        self.look_up(data.draw(st.sampled_from(self.seen)))

    def look_up(self, tokens):
        """What the index leads to holds the tokens, whoever wrote them and whoever is left."""
        branch = Branch()
        found = self.trie.match(branch, tokens)
        content = [token for page in branch.pages for token in self.pages[page]]
        assert content == tokens[:found] == branch.tokens
        self.trie.release(branch)

    @precondition(lambda self: self.model)
    @rule()
    def evict_everything(self):
        """Somebody else needs all pages for a moment: whatever was only kept is forgotten."""
        pages = self.ledger.take(self.ledger.available)
        assert not {page for branch in self.model for page in branch.pages} & set(pages)
        self.ledger.release(pages)
        self.write_step([], [])

    # What always holds.

    def counts(self):
        return Counter({p: self.ledger.count(p) for p in range(self.ledger.num_pages)})

    def snapshot(self):
        branches = [(b, list(b.tokens), list(b.pages), len(b._nodes)) for b in self.model]
        return self.counts(), self.ledger.available, branches

    @invariant()
    def a_branch_reads_back_its_tokens(self):
        for branch, tokens in self.model.items():
            assert branch.tokens == tokens
            assert len(branch.pages) == math.ceil(len(tokens) / self.size)
            content = [token for page in branch.pages for token in self.pages[page]]
            assert content[: len(tokens)] == tokens

    @invariant()
    def counts_are_the_references(self):
        references = Counter(page for branch in self.model for page in branch.pages)
        assert self.counts() == references
        assert self.ledger.held == len(references) <= self.ledger.peak
        assert self.ledger.available == self.ledger.num_pages - len(references)

    @invariant()
    def owners_of_a_page_share_its_tokens(self):
        owner = {}
        for branch in self.model:
            for depth, page in enumerate(branch.pages):
                first, first_depth = owner.setdefault(page, (branch, depth))
                assert first_depth == depth
                end = min(len(branch), len(first), (depth + 1) * self.size)
                assert branch.tokens[:end] == first.tokens[:end]

    @invariant()
    def equal_full_prefixes_are_one_page(self):
        page_of = {}
        for branch in self.model:
            for depth in range(len(branch) // self.size):
                prefix = tuple(branch.tokens[: (depth + 1) * self.size])
                assert page_of.setdefault(prefix, branch.pages[depth]) == branch.pages[depth]
        if self.size == 1:
            assert self.ledger.held == len(distinct_prefixes(self.model.values()))

    def teardown(self):
        if not hasattr(self, "model"):
            return
        for branch in list(self.model):
            self.trie.release(branch)
        for tokens in self.seen:
            self.look_up(tokens)
        everything = self.ledger.num_pages
        assert self.ledger.held == 0 and self.ledger.available == everything
        pages = self.ledger.take(everything)
        assert sorted(pages) == list(range(everything))
        # All pages are somebody else's now: the index must not lead to them any more.
        assert all(self.trie.match(Branch(), tokens) == 0 for tokens in self.seen)


TestTrie = TrieMachine.TestCase
TestTrie.settings = settings(
    deadline=None, derandomize=True, max_examples=200, stateful_step_count=30, database=None
)


@settings(deadline=None, derandomize=True, max_examples=100, database=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=8))
def test_pages_are_what_sorted_neighbours_do_not_share(sequences):
    """Saffron-1, proposition 2, as identities: memory by lengths, attention's work by squares."""
    trie = PrefixTrie(PageLedger(64), page_size=1)
    branches = [trie.insert(s) for s in sequences]
    order = sorted(sequences)
    shared = [common(a, b) for a, b in zip(order, order[1:])]  # noqa: B905, RUF007
    prefixes = distinct_prefixes(sequences)
    assert sum(map(len, sequences)) - sum(shared) == len(prefixes) == trie.ledger.held
    depth = {page: i + 1 for branch in branches for i, page in enumerate(branch.pages)}
    squares = sum(len(s) ** 2 for s in sequences) - sum(n * n for n in shared)
    assert squares == sum(2 * d - 1 for d in depth.values())


def test_a_partly_filled_page_is_copied_by_the_first_who_writes():
    trie = PrefixTrie(PageLedger(8), page_size=4)
    parent = trie.insert([1, 2, 3, 4, 5])
    child = trie.fork(parent)
    assert child.pages == [0, 1] and trie.ledger.held == 2
    assert trie.extend(child, [6]).copies == ((1, 2),)
    assert (parent.pages, child.pages) == ([0, 1], [0, 2])
    assert trie.extend(parent, [7]).copies == ()  # now its own


def test_a_page_that_is_found_again_is_not_copied_to():
    """The copy that `extend` prepared is not needed when the filled page turns out to exist."""
    trie = PrefixTrie(PageLedger(8), page_size=2)
    trie.insert([1, 2])
    first, second = trie.insert([1]), trie.insert([3])
    forks = trie.fork(first), trie.fork(second)
    copies = trie.extend(first, [2]).copies + trie.extend(second, [4]).copies
    targets = [target for _, target in copies]
    assert len(set(targets)) == len(targets)
    assert set(targets) <= {page for b in (first, second, *forks) for page in b.pages}


def test_a_truncated_page_stays_findable_and_is_not_written():
    trie = PrefixTrie(PageLedger(8), page_size=2)
    branch = trie.insert([1, 2, 3, 4])
    trie.truncate(branch, 3)
    assert branch.pages == [0, 1]
    assert trie.extend(branch, [5]).copies == ((1, 2),)
    assert trie.insert([1, 2, 3, 4]).pages == [0, 1]


def test_kept_pages_come_back_and_the_continuation_is_evicted_first():
    trie = PrefixTrie(PageLedger(3), page_size=2)
    trie.release(trie.insert([1, 2, 3, 4, 5, 6]))
    assert (trie.ledger.held, trie.ledger.available) == (0, 3)
    (other,) = trie.ledger.take(1)
    branch = Branch()
    assert trie.match(branch, [1, 2, 3, 4, 5, 6]) == 4
    assert branch.pages == [0, 1] and other == 2


def test_the_least_recently_released_is_evicted_first():
    trie = PrefixTrie(PageLedger(3), page_size=1)
    for token in (1, 2, 3):
        trie.release(trie.insert([token]))
    trie.release(trie.insert([1]))  # used again
    trie.ledger.take(2)
    assert [trie.match(Branch(), [token]) for token in (1, 2, 3)] == [1, 0, 0]


def test_misuse_of_the_ledger_raises():
    ledger = PageLedger(4)
    with pytest.raises(ValueError, match="page 0 is free"):
        ledger.hold([0])
    with pytest.raises(ValueError, match="page 0 has no owner"):
        ledger.index(0)
    pages = ledger.take(2)
    ledger.release(pages)
    with pytest.raises(ValueError, match="released more often"):
        ledger.release(pages)
    with pytest.raises(OutOfPages, match="asked for 5 pages, 4 of 4 available"):
        ledger.take(5)
    assert (ledger.held, ledger.available, ledger.peak) == (0, 4, 2)
    assert sorted(ledger.take(4)) == [0, 1, 2, 3]


def test_an_index_taken_back_frees_a_kept_page():
    ledger = PageLedger(2)
    pages = ledger.take(2)
    ledger.index(pages[0])
    ledger.release(pages)
    ledger.hold(pages[:1])  # kept: may be held again
    ledger.release(pages[:1])
    ledger.unindex(pages[0])
    with pytest.raises(ValueError, match="is free"):
        ledger.hold(pages[:1])
    assert ledger.available == 2
