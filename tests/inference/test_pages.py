"""Page accounting, against an obvious account of the same thing, and at its edges."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ziphius.config.errors import BadInput
from ziphius.inference.pages import PagePool, PageTable

GARBAGE = -1

# --- the obvious account --------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("n_pages", "page_size", "reuse"),
    [(12, 4, True), (12, 1, True), (1, 4, True), (40, 2, True), (12, 3, False)],
)
def test_ten_thousand_random_operations_leave_every_page_free(
    n_pages: int, page_size: int, reuse: bool
) -> None:
    world, rng = World(n_pages, page_size, reuse=reuse), random.Random(n_pages * page_size)
    for _ in range(10_000):
        one(world, rng)
        world.check()
    happened = world.happened
    assert happened["no room to begin"] > 100
    assert happened["preempted"] > 100
    assert n_pages == 1 or happened["forked"] > 100
    if reuse and n_pages > 1:
        assert min(happened[what] for what in ("found", "evicted", "merged")) > 100, happened
    elif not reuse:
        assert happened["found"] == happened["evicted"] == 0
    drain(world)


TOKENS = st.lists(st.sampled_from((1, 1, 1, 2)), min_size=1, max_size=12)
WHICH = st.integers(0, 7)


class Machine(RuleBasedStateMachine):
    """The same operations, chosen and made small by hypothesis."""

    @initialize(n_pages=st.integers(1, 8), page_size=st.integers(1, 4), reuse=st.booleans())
    def start(self, n_pages: int, page_size: int, reuse: bool) -> None:
        self.world = World(n_pages, page_size, reuse=reuse)

    def runs(self) -> bool:
        return bool(self.world.running)

    def waits(self) -> bool:
        return bool(self.world.waiting)

    def holder(self, which: int) -> Holder:
        return self.world.running[which % len(self.world.running)]

    @rule(tokens=TOKENS, salt=st.sampled_from((b"", b"a")))
    def admit(self, tokens: list[int], salt: bytes) -> None:
        world = self.world
        world.admit(tokens[: world.pool.n_pages * world.size], salt)
        world.begin(world.waiting[-1])

    @precondition(waits)
    @rule(which=WHICH, recompute=st.integers(0, 5), limit=st.one_of(st.none(), st.integers(0, 12)))
    def begin(self, which: int, recompute: int, limit: int | None) -> None:
        self.world.begin(self.world.waiting[which % len(self.world.waiting)], recompute, limit)

    @precondition(runs)
    @rule(which=WHICH, count=st.integers(1, 12))
    def compute(self, which: int, count: int) -> None:
        self.world.compute(self.holder(which), count)

    @precondition(runs)
    @rule(which=WHICH, tokens=TOKENS)
    def extend(self, which: int, tokens: list[int]) -> None:
        holder = self.holder(which)
        longest = self.world.pool.n_pages * self.world.size - len(holder.tokens)
        self.world.extend(holder, tokens[:longest])

    @precondition(runs)
    @rule(which=WHICH, count=st.integers(1, 5))
    def draft(self, which: int, count: int) -> None:
        self.world.draft(self.holder(which), count)

    @precondition(runs)
    @rule(which=WHICH, data=st.data())
    def fork(self, which: int, data: st.DataObject) -> None:
        holder = self.holder(which)
        if holder.computed:
            self.world.fork(holder, data.draw(st.integers(1, holder.computed)))

    @precondition(runs)
    @rule(which=WHICH, how=st.sampled_from(("preempt", "cancel", "finish")))
    def end(self, which: int, how: str) -> None:
        getattr(self.world, how)(self.holder(which))

    @invariant()
    def right(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            drain(self.world)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

# --- at the edges ---------------------------------------------------------------------------------


def filled(pool: PagePool, tokens: list[int], salt: bytes = b"") -> PageTable:
    """Return a table whose rows are all computed and published."""
    table = PageTable(pool, salt)
    assert table.begin(tokens) is not None
    table.publish(tokens, len(tokens))
    return table


def test_a_prompt_is_never_found_whole() -> None:
    """Its last token is computed for its logits, also where the prompt ends with a page."""
    pool = PagePool(8, 4)
    filled(pool, list(range(8))).release()
    for length, start in ((4, 0), (5, 4), (7, 4), (8, 4), (9, 8)):
        table = PageTable(pool)
        assert table.begin(list(range(length))) == start
        assert table.slots(start, length)[0] >= 0
        table.release()


def test_recomputed_tokens_have_no_slot() -> None:
    pool = PagePool(8, 4)
    filled(pool, list(range(9))).release()
    table = PageTable(pool)
    assert table.begin(list(range(11)), recompute=1) == 7
    first = table.pages[2] * 4
    assert table.slots(7, 11) == [-1, first, first + 1, first + 2]
    table.release()
    assert table.begin(list(range(4)), recompute=1) == 0  # nothing found, nothing again


def test_a_limit_cuts_the_found_prefix() -> None:
    pool = PagePool(8, 2)
    filled(pool, list(range(8))).release()
    for limit, start in ((0, 0), (1, 0), (2, 2), (5, 4), (99, 6)):
        table = PageTable(pool)
        assert table.begin(list(range(8)), limit=limit) == start
        table.release()


def test_other_salts_do_not_share() -> None:
    pool = PagePool(8, 2)
    filled(pool, [1, 2, 3, 4], b"a").release()
    for salt, start in ((b"", 0), (b"b", 0), (b"a", 2)):
        table = PageTable(pool, salt)
        assert table.begin([1, 2, 3, 4], spare=0) == start
        table.release()


def test_a_salt_that_imitates_a_page_does_not_share() -> None:
    """The key of a page is that of other bytes than any salt's."""
    pool = PagePool(8, 1)
    owner = filled(pool, [1, 2, 3])
    spy = PageTable(pool, owner._keys[0] + (1).to_bytes(8, "little"))
    assert spy.begin([2, 3, 4]) == 0


def test_only_equal_tokens_from_the_start_on_are_shared() -> None:
    pool = PagePool(8, 2)
    filled(pool, [1, 2, 3, 4, 5]).release()
    for tokens, start in (([1, 2, 3, 4, 9], 4), ([1, 2, 9, 4, 5], 2), ([3, 4, 5], 0)):
        table = PageTable(pool)
        assert table.begin(tokens) == start
        table.release()


def test_rows_that_are_not_computed_are_not_found() -> None:
    pool = PagePool(8, 2)
    table = PageTable(pool)
    table.begin([1, 2, 3, 4, 5])
    table.publish([1, 2, 3, 4, 5], 3)
    assert PageTable(pool).begin([1, 2, 3, 4, 5]) == 2


def test_equal_pages_are_merged_and_the_second_is_given_back() -> None:
    pool = PagePool(8, 2)
    tokens = [1, 2, 3, 4, 5]
    first, second = PageTable(pool), PageTable(pool)
    first.begin(tokens), second.begin(tokens)
    assert pool.used == 6
    first.publish(tokens, 5), second.publish(tokens, 5)
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    assert pool.used == 4
    pool.check([first, second])


def test_children_are_taken_before_parents_and_the_least_recent_first() -> None:
    pool = PagePool(6, 1)
    for tokens, pages in (([1, 2, 3], [0, 1, 2]), ([4, 5, 6], [3, 4, 5])):
        table = filled(pool, tokens)
        assert table.pages == pages
        table.release()
    # Page 0 is used again, its children are not; page 2 is taken for the 9 and given back blank.
    table = PageTable(pool)
    assert table.begin([1, 9]) == 1
    assert table.pages == [0, 2]
    table.release()
    assert [pool.take(1) for _ in range(6)] == [[2], [1], [5], [4], [3], [0]]


def test_a_fork_shares_full_pages_and_copies_the_last() -> None:
    pool = PagePool(8, 4)
    parent = filled(pool, list(range(10)))
    child, copies = parent.fork(10)
    assert child.pages[:2] == parent.pages[:2]
    assert copies == [(parent.pages[2], child.pages[2])]
    assert child.slots(9, 10) == [-1]
    assert child.slots(10, 12) == [child.pages[2] * 4 + 2, child.pages[2] * 4 + 3]
    parent.release()
    assert pool.used == 3
    pool.check([child])
    whole, none = child.fork(8)
    assert (whole.pages, none) == (child.pages[:2], [])


def test_a_fork_without_room_changes_nothing() -> None:
    pool = PagePool(2, 4)
    parent = filled(pool, list(range(6)))
    assert parent.fork(6) is None
    pool.check([parent])
    child, _ = parent.fork(4)
    pool.check([parent, child])


def test_one_page() -> None:
    pool = PagePool(1, 1)
    table = PageTable(pool)
    assert table.begin([5]) == 0
    assert not table.extend(2)
    assert PageTable(pool).begin([5]) is None
    table.publish([5], 1)
    table.release()
    table.release()
    assert (pool.free, pool.cached, pool.used) == (1, 1, 0)
    assert table.begin([6]) == 0
    assert (pool.free, pool.cached, pool.used) == (0, 0, 1)


def test_spare_pages_are_left() -> None:
    pool = PagePool(4, 2)
    assert PageTable(pool).begin([1, 2, 3], spare=3) is None
    assert PageTable(pool).begin([1, 2, 3], spare=2) == 0


def test_misuse_is_an_error_that_says_so() -> None:
    pool = PagePool(4, 2)
    (page,) = pool.take(1)
    for never in (page + 1, 4, -1):
        with pytest.raises(ValueError, match=f"page {never} was never taken from this pool of 4"):
            pool.release(never)
        with pytest.raises(ValueError, match="never taken"):
            pool.hold(never)
    pool.release(page)
    with pytest.raises(ValueError, match=f"page {page} is released twice"):
        pool.release(page)
    with pytest.raises(ValueError, match="given back and is blank"):
        pool.hold(page)
    table = PageTable(pool)
    table.begin([1, 2, 3])
    with pytest.raises(ValueError, match="the table has pages already"):
        table.begin([1, 2, 3])
    with pytest.raises(ValueError, match="can't fork 5 positions of 4"):
        table.fork(5)
    with pytest.raises(ValueError, match="can't fork 1 full pages: 0 are published"):
        table.fork(2)
    with pytest.raises(ValueError, match="page 1 isn't full: the sequence has 3 tokens"):
        table.publish([1, 2, 3], 4)
    with pytest.raises(ValueError, match="2 pages are held"):
        pool.forget()
    with pytest.raises(ValueError, match="can't trim to 1 positions"):
        table.trim(1)
    pool.check([table])
    for pages, size in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(BadInput, match="holds nothing"):
            PagePool(pages, size)


@pytest.mark.parametrize(
    "broken",
    [
        "_blank.append(2)", "_cached.update({0: None})", "_holders.__setitem__(0, 0)",
        "_holders.__setitem__(0, 5)", "_keys.__setitem__(3, (b'', b''))", "_page_of.clear()",
        "_cached.popitem()", "_cached.move_to_end(3)",
    ],
)  # fmt: skip
def test_the_check_notices(broken: str) -> None:
    """Pages 0 and 1 are held and known, 3 and 2 cached and known, 4 was never taken."""
    pool = PagePool(5, 1)
    table = filled(pool, [1, 2])
    other = filled(pool, [3, 4])
    assert (table.pages, other.pages) == ([0, 1], [2, 3])
    other.release()
    pool.check([table])
    eval(f"pool.{broken}", {"pool": pool})
    with pytest.raises(AssertionError):
        pool.check([table])
