"""An obvious account of pages, beside which a pool's must stand."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from ziphius.inference.pages import PagePool, PageTable

GARBAGE = -1


@dataclass(eq=False)
class Holder:
    """A sequence: its table, and for each token the row that its position must have."""

    table: PageTable
    salt: bytes
    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    computed: int = 0

    def append(self, tokens: list[int]) -> None:
        for token in tokens:
            self.rows.append(hash((self.rows[-1] if self.rows else len(self.salt), token)))
            self.tokens.append(token)


class World:
    """Sequences over a pool. After each operation the pool must be as plain counting says.

    A row is a hash of the salt and all tokens up to its position, written where the table says. So
    a page that is shared wrongly, written twice or taken too early shows as a wrong row.
    """

    def __init__(self, n_pages: int, page_size: int, *, reuse: bool = True) -> None:
        self.pool, self.size = PagePool(n_pages, page_size, reuse=reuse), page_size
        self.running: list[Holder] = []
        self.waiting: list[Holder] = []
        self.store = [GARBAGE] * (n_pages * page_size)
        self.known: dict[int, int] = {}  # from the row at a page's end to the page
        self.idle: dict[int, tuple[int, int]] = {}  # known and held by nobody: (since, -depth)
        self.clock = 0
        self.happened: Counter[str] = Counter()

    def held(self) -> set[int]:
        return {page for holder in self.running for page in holder.table.pages}

    def blank(self) -> set[int]:
        return set(range(self.pool.n_pages)) - self.held() - set(self.known.values())

    def check(self) -> None:
        pool, held = self.pool, self.held()
        pool.check(holder.table for holder in self.running)
        assert pool.used == len(held)
        assert pool.free == pool.n_pages - len(held)
        assert pool.cached == len(self.idle)
        assert set(self.idle) == set(self.known.values()) - held
        for holder in self.running:
            for position in range(holder.computed):
                assert self.store[self.slot(holder, position)] == holder.rows[position]

    def slot(self, holder: Holder, position: int) -> int:
        return holder.table.pages[position // self.size] * self.size + position % self.size

    def expect_taken(self, new: list[int], blank: set[int]) -> None:
        """Blank pages go first, then known ones, the least recently used first."""
        evicted = sorted(self.idle, key=self.idle.__getitem__)[: max(0, len(new) - len(blank))]
        assert set(new) - blank == set(evicted)
        assert len(set(new)) == len(new)
        for page in evicted:
            del self.idle[page]
        self.known = {row: page for row, page in self.known.items() if page not in evicted}
        self.happened["evicted"] += len(evicted)

    # --- operations

    def admit(self, tokens: list[int], salt: bytes) -> None:
        self.waiting.append(Holder(PageTable(self.pool, salt), salt))
        self.waiting[-1].append(tokens)

    def begin(self, holder: Holder, recompute: int = 0, limit: int | None = None) -> bool:
        table, length = holder.table, len(holder.tokens)
        hits: list[int] = []
        for end in range(
            self.size, min(length - 1, length if limit is None else limit) + 1, self.size
        ):
            if holder.rows[end - 1] not in self.known:
                break
            hits.append(self.known[holder.rows[end - 1]])
        room = self.pool.n_pages - len(self.held() | set(hits)) + len(hits)
        blank = self.blank()
        start = table.begin(holder.tokens, recompute=recompute, limit=limit)
        if -(-length // self.size) > room:
            assert start is None
            assert not table.pages
            self.happened["no room to begin"] += 1
            return False
        assert start == max(len(hits) * self.size - recompute, 0)
        assert table.shared == len(hits) * self.size
        assert table.pages[: len(hits)] == hits
        assert len(table.pages) == -(-length // self.size)
        for page in hits:
            self.idle.pop(page, None)
        self.expect_taken(table.pages[len(hits) :], blank)
        holder.computed = start
        self.waiting.remove(holder)
        self.running.append(holder)
        self.happened["found"] += len(hits)
        return True

    def compute(self, holder: Holder, count: int) -> None:
        """Write the next rows, then publish."""
        table, start = holder.table, holder.computed
        end = min(start + count, len(holder.tokens), table.capacity)
        for position, slot in zip(range(start, end), table.slots(start, end), strict=True):
            if slot < 0:
                assert position < table.shared
            else:
                assert slot == self.slot(holder, position)
                self.store[slot] = holder.rows[position]
        holder.computed = end
        expected = list(table.pages)
        for index in range(end // self.size if self.pool.reuse else 0):
            row = holder.rows[(index + 1) * self.size - 1]
            expected[index] = self.known.setdefault(row, expected[index])
            self.idle.pop(expected[index], None)
        self.happened["merged"] += expected != table.pages
        table.publish(holder.tokens, end)
        assert table.pages == expected

    def extend(self, holder: Holder, tokens: list[int]) -> None:
        """Append tokens and take pages for them, from the last ones where none is free."""
        holder.append(tokens)
        table = holder.table
        while not self._room(holder, len(holder.tokens)):
            last = self.running[-1]
            self.preempt(last)
            if last is holder:
                return
        assert table.capacity >= len(holder.tokens)

    def draft(self, holder: Holder, count: int) -> None:
        """Write rows behind the end that turn out to be wrong."""
        length = len(holder.tokens)
        if holder.table.capacity < length or not self._room(holder, length + count):
            return
        for slot in holder.table.slots(length, length + count):
            self.store[slot] = GARBAGE
        holder.table.trim(length)

    def _room(self, holder: Holder, length: int) -> bool:
        table, before = holder.table, list(holder.table.pages)
        missing = max(0, -(-length // self.size) - len(before))
        blank, free = self.blank(), self.pool.n_pages - len(self.held())
        if not table.extend(length):
            assert missing > free
            assert table.pages == before
            return False
        assert missing <= free
        assert table.pages[: len(before)] == before
        self.expect_taken(table.pages[len(before) :], blank)
        return True

    def fork(self, holder: Holder, length: int) -> None:
        blank, free = self.blank(), self.pool.n_pages - len(self.held())
        result = holder.table.fork(length)
        full, partial = divmod(length, self.size)
        if partial and not free:
            assert result is None
            self.happened["no room to fork"] += 1
            return
        table, copies = result
        self.expect_taken(table.pages[full:], blank)
        assert table.pages[:full] == holder.table.pages[:full]
        assert copies == ([(holder.table.pages[full], table.pages[full])] if partial else [])
        for source, target in copies:
            for offset in range(self.size):
                self.store[target * self.size + offset] = self.store[source * self.size + offset]
        child = Holder(table, holder.salt, holder.tokens[:length], holder.rows[:length], length - 1)
        self.running.append(child)
        self.happened["forked"] += 1

    def preempt(self, holder: Holder) -> None:
        self._release(holder)
        holder.computed = 0
        self.waiting.append(holder)
        self.happened["preempted"] += 1

    def cancel(self, holder: Holder) -> None:
        if holder in self.waiting:
            self.waiting.remove(holder)
        else:
            self._release(holder)
        holder.table.release()

    def _release(self, holder: Holder) -> None:
        pages = list(holder.table.pages)
        self.running.remove(holder)
        holder.table.release()
        self.clock += 1
        gone = set(pages) - self.held()
        for depth, page in enumerate(pages):
            if page in gone and page in self.known.values():
                self.idle[page] = (self.clock, -depth)

    def finish(self, holder: Holder) -> None:
        self.compute(holder, len(holder.tokens))
        self.cancel(holder)


def one(world: World, rng: random.Random) -> None:
    """Do a random operation that is possible."""
    holder = rng.choice(world.running) if world.running else None
    name = rng.choices(
        ("admit", "begin", "compute", "extend", "draft", "fork", "preempt", "cancel", "finish"),
        (4, 8, 10, 8, 2, 3, 1, 1, 1),
    )[0]
    if name == "admit" and len(world.waiting) < 8:
        longest = world.pool.n_pages * world.size
        tokens = rng.choices((1, 2), (6, 1), k=rng.randint(1, longest))
        world.admit(tokens, rng.choice((b"", b"", b"a")))
    elif name == "begin" and world.waiting:
        limit = rng.choice((None, None, rng.randint(0, 9)))
        world.begin(rng.choice(world.waiting), rng.randint(0, 2), limit)
    elif name == "cancel" and world.waiting and rng.random() < 0.5:
        world.cancel(rng.choice(world.waiting))
    elif holder is None:
        return
    elif name == "compute":
        world.compute(holder, rng.randint(1, 9))
    elif name == "extend":
        longest = world.pool.n_pages * world.size - len(holder.tokens)
        world.extend(holder, rng.choices((1, 2), (6, 1), k=min(longest, rng.randint(1, 3))))
    elif name == "draft":
        world.draft(holder, rng.randint(1, 4))
    elif name == "fork" and holder.computed:
        world.fork(holder, rng.randint(1, holder.computed))
    elif name in ("preempt", "cancel", "finish"):
        getattr(world, name)(holder)


def drain(world: World) -> None:
    """End everything: all pages are free, cached or blank."""
    while world.running:
        world.cancel(world.running[0])
        world.check()
    while world.waiting:
        world.cancel(world.waiting[0])
    assert world.pool.free == world.pool.n_pages
    assert world.pool.used == 0
    world.pool.forget()
    world.known, world.idle = {}, {}
    world.check()
    assert world.pool.cached == 0
