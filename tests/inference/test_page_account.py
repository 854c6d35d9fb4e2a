"""Page accounting under random operations, against an obvious account of the same thing."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.inference.page_account import Holder, World, drain, one


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
