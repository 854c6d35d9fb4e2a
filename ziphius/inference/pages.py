"""Pages of the cache: who holds them, which prefix each holds, and which may be taken.

A page is ``page_size`` consecutive slots of the cache; the row of position p of a sequence lies in
slot ``pages[p // page_size] * page_size + p % page_size``. This file counts; the rows are
elsewhere.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256

from ziphius.config.errors import BadInput


class PagePool:
    """All pages. Each has a count of holders; a full one may be known by its prefix.

    The key of a full page is the SHA-256 of its parent's key and its tokens, the first parent's key
    that of the tenant's salt: equal keys are equal tokens from the start on, and tenants with
    different salts never meet. A known page that nobody holds is *cached*: it counts as free, can
    be found again, and is taken for other rows when no blank page is left, least recently used
    first.

    A holder of a known page also holds the known pages before it, and gives back the last first. So
    a child is never held longer, nor used later, than its parent, and is taken before it.

    With ``reuse=False`` no page is ever known.
    """

    def __init__(self, n_pages: int, page_size: int, *, reuse: bool = True) -> None:
        if n_pages < 1 or page_size < 1:
            raise BadInput(
                f"a cache of {n_pages} pages of {page_size} tokens holds nothing: "
                "give it at least one page of one token"
            )
        self.n_pages, self.page_size, self.reuse = n_pages, page_size, reuse
        self._holders = [0] * n_pages
        self._blank: list[int] = []
        self._never_taken = 0  # pages from this one on
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[bytes, int] = {}
        self._keys: list[tuple[bytes, bytes] | None] = [None] * n_pages  # its own, its parent's

    @property
    def free(self) -> int:
        """Pages that nobody holds, cached ones included."""
        return len(self._blank) + self.n_pages - self._never_taken + len(self._cached)

    @property
    def cached(self) -> int:
        """Pages that nobody holds and that hold a known prefix."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.n_pages - self.free

    def holders(self, page: int) -> int:
        """Return how many hold the page."""
        self._expect_taken(page)
        return self._holders[page]

    def take(self, count: int) -> list[int] | None:
        """Take ``count`` pages; None, and nothing is taken, where fewer are free."""
        if count > self.free:
            return None
        pages = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            elif self._never_taken < self.n_pages:
                page = self._never_taken
                self._never_taken += 1
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
            self._holders[page] = 1
            pages.append(page)
        return pages

    def hold(self, page: int) -> None:
        """Hold a page that somebody holds already, or that is cached."""
        self._expect_taken(page)
        if not self._holders[page]:
            if page not in self._cached:
                raise ValueError(f"page {page} can't be held: it was given back and is blank")
            del self._cached[page]
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """Give back what ``take`` or ``hold`` gave. A known page stays known."""
        self._expect_taken(page)
        if not self._holders[page]:
            raise ValueError(f"page {page} is released twice: nobody holds it")
        self._holders[page] -= 1
        if not self._holders[page]:
            if self._keys[page] is None:
                self._blank.append(page)
            else:
                self._cached[page] = None

    def find(self, key: bytes) -> int | None:
        """Return the page known by a key."""
        return self._page_of.get(key)

    def publish(self, page: int, key: bytes, parent: bytes) -> int:
        """Make a full page known; return the page known by the key, an earlier one if there is."""
        known = self._page_of.setdefault(key, page)
        if known == page:
            self._keys[page] = (key, parent)
        return known

    def forget(self) -> None:
        """Forget every prefix: new weights give other rows. Nobody may hold a page."""
        if self.used:
            raise ValueError(f"{self.used} pages are held: end their sequences before forgetting")
        self.drop_cached()

    def drop_cached(self) -> None:
        """Forget the prefixes that nobody holds, at any moment; those held stay known."""
        self._blank += self._cached
        for page in self._cached:
            self._forget(page)
        self._cached.clear()

    def check(self, tables: Iterable[PageTable] | None = None) -> None:
        """Raise AssertionError unless the accounts are right; with ``tables``, all that exist."""
        states = [*self._blank, *range(self._never_taken, self.n_pages), *self._cached]
        assert len(set(states)) == len(states) == self.free, "a page is free twice"
        assert {p for p, held in enumerate(self._holders) if not held} == set(states), "holders"
        assert all(held >= 0 for held in self._holders), "a negative count of holders"
        known = {page: keys for page, keys in enumerate(self._keys) if keys}
        assert {keys[0]: page for page, keys in known.items()} == self._page_of, "keys"
        assert self._cached.keys() <= known.keys(), "a cached page without a key"
        assert not known.keys() & {*states} - self._cached.keys(), "a blank page has a key"
        age = {page: place for place, page in enumerate(self._cached)}
        for page, (_, parent) in known.items():
            if (before := self._page_of.get(parent)) is None:
                continue
            assert self._holders[before] >= self._holders[page], "a child has more holders"
            assert before not in age or age[page] < age[before], "a parent is taken first"
        if tables is not None:
            tables = list(tables)
            held = Counter(page for table in tables for page in table.pages)
            assert self._holders == [held[page] for page in range(self.n_pages)], "holders"
            for table in tables:
                table.check()

    def _forget(self, page: int) -> None:
        keys = self._keys[page]
        assert keys is not None
        del self._page_of[keys[0]]
        self._keys[page] = None

    def _expect_taken(self, page: int) -> None:
        if not 0 <= page < self._never_taken:
            raise ValueError(f"page {page} was never taken from this pool of {self.n_pages} pages")


class PageTable:
    """The pages of one sequence, whose tokens only grow.

    ``pages`` are in the order of positions. Rows of positions below ``shared`` may be those of
    others too and must not be written. The first ``published`` pages are known to the pool.
    """

    __slots__ = ("_keys", "pages", "pool", "published", "shared")

    def __init__(self, pool: PagePool, salt: bytes = b"") -> None:
        self.pool = pool
        self.pages: list[int] = []
        self.shared = 0
        self.published = 0
        # Of the salt, then of each full page, computed when first needed and kept after a release.
        self._keys = [sha256(b"salt" + salt).digest()]

    @property
    def capacity(self) -> int:
        """Positions that the pages have room for."""
        return len(self.pages) * self.pool.page_size

    def begin(
        self, tokens: Sequence[int], *, recompute: int = 0, limit: int | None = None, spare: int = 0
    ) -> int | None:
        """Take pages for all ``tokens``, known ones first; return the first position to compute.

        At least the last token is left to compute, and ``recompute`` tokens of the known prefix
        are computed again (their rows are not written): MTP needs the hidden state before the first
        new token. The prefix is cut to ``limit`` positions. None, and nothing is changed, where
        this would leave fewer than ``spare`` pages free.
        """
        if self.pages:
            raise ValueError("the table has pages already: release them before it begins again")
        pool, size = self.pool, self.pool.page_size
        found: list[int] = []
        if pool.reuse:
            last = len(tokens) - 1 if limit is None else min(len(tokens) - 1, limit)
            for index in range(last // size):
                page = pool.find(self._key(index, tokens))
                if page is None:
                    break
                found.append(page)
        new = -(-len(tokens) // size) - len(found)
        if new + sum(not pool.holders(page) for page in found) > pool.free - spare:
            return None
        # Held before others are taken, as a cached page might be among those.
        for page in found:
            pool.hold(page)
        taken = pool.take(new)
        assert taken is not None
        self.pages = found + taken
        self.published = len(found)
        self.shared = len(found) * size
        return max(self.shared - recompute, 0)

    def extend(self, length: int) -> bool:
        """Take pages until ``length`` positions have room; False where too few are free."""
        missing = -(-length // self.pool.page_size) - len(self.pages)
        if missing > 0:
            pages = self.pool.take(missing)
            if pages is None:
                return False
            self.pages += pages
        return True

    def trim(self, length: int) -> None:
        """Give back the pages that ``length`` positions do not need."""
        kept = -(-length // self.pool.page_size)
        if kept < self.published or length < self.shared:
            raise ValueError(f"can't trim to {length} positions: more are shared or published")
        while len(self.pages) > kept:
            self.pool.release(self.pages.pop())

    def publish(self, tokens: Sequence[int], computed: int) -> None:
        """Make the full pages among the first ``computed`` positions known; their rows are there.

        A page whose tokens are known already is given back for the one that holds them, so
        ``pages`` may change.
        """
        pool = self.pool
        if not pool.reuse:
            return
        for index in range(self.published, computed // pool.page_size):
            page = self.pages[index]
            known = pool.publish(page, self._key(index, tokens), self._keys[index])
            if known != page:
                pool.hold(known)
                pool.release(page)
                self.pages[index] = known
            self.published += 1
            self.shared = max(self.shared, self.published * pool.page_size)

    def fork(self, length: int) -> tuple[PageTable, list[tuple[int, int]]] | None:
        """Return a table with the first ``length`` positions, and (source, target) pages to copy.

        Full pages are shared, a last partial one is copied, by the caller and before either table's
        next row is written. The rows must be computed and published. None, and nothing is changed,
        where no page is free for the copy.
        """
        pool = self.pool
        full, partial = divmod(length, pool.page_size)
        if not 0 < length <= self.capacity:
            raise ValueError(f"can't fork {length} positions of {self.capacity}")
        if pool.reuse and full > self.published:
            raise ValueError(f"can't fork {full} full pages: {self.published} are published")
        copy = pool.take(1 if partial else 0)
        if copy is None:
            return None
        child = PageTable(pool)
        child._keys = self._keys[: full + 1]
        child.pages = self.pages[:full] + copy
        child.published = full if pool.reuse else 0
        child.shared = length
        for page in self.pages[:full]:
            pool.hold(page)
        self.shared = max(self.shared, full * pool.page_size)
        return child, [(self.pages[full], page) for page in copy]

    def release(self) -> None:
        """Give back all pages, the last first (see ``PagePool``). Safe to repeat."""
        while self.pages:
            self.pool.release(self.pages.pop())
        self.shared = self.published = 0

    def slots(self, start: int, end: int) -> list[int]:
        """Return the slot of each position from ``start`` to ``end``, -1 for shared ones."""
        size = self.pool.page_size
        position = min(max(start, self.shared), end)
        slots = [-1] * (position - start)
        while position < end:
            index, offset = divmod(position, size)
            count = min(size - offset, end - position)
            first = self.pages[index] * size + offset
            slots += range(first, first + count)
            position += count
        return slots

    def check(self) -> None:
        """Raise AssertionError unless the table is consistent with its pool."""
        pool = self.pool
        assert len(set(self.pages)) == len(self.pages), "a page is in a table twice"
        assert 0 <= self.shared <= self.capacity, "more is shared than there is"
        assert 0 <= self.published * pool.page_size <= self.shared, "a published page is written"
        for index, page in enumerate(self.pages):
            if index < self.published:
                assert pool.find(self._keys[index + 1]) == page, "not the published page"
            else:
                assert pool._keys[page] is None, "a known page behind the published ones"
            if (index + 1) * pool.page_size > self.shared:
                assert pool.holders(page) == 1, "a page that is written is shared"

    def _key(self, index: int, tokens: Sequence[int]) -> bytes:
        keys, size = self._keys, self.pool.page_size
        while len(keys) <= index + 1:
            page = len(keys) - 1
            ids = array("q", tokens[page * size : (page + 1) * size])
            if len(ids) < size:
                raise ValueError(f"page {page} isn't full: the sequence has {len(tokens)} tokens")
            keys.append(sha256(b"page" + keys[-1] + ids.tobytes()).digest())
        return keys[index + 1]
