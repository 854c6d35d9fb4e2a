"""Random loads: each answer is its own whatever happens around it, and every page comes back."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.inference.scheduling import expect_answer, scheduler
from tests.inference.simulation import VOCABULARY, Engine, rows
from ziphius.config.errors import BadInput
from ziphius.inference.sequence import QueueFull, Sequence, Step


class Load:
    """Requests over an engine, some of them cancelled or late; what is left must be right."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self.engine, self.scheduler, self.rng = engine, engine.scheduler, rng
        self.live: list[Sequence] = []
        self.scored: list[Sequence] = []
        self.happened: Counter[str] = Counter()
        self.now = 0.0

    def add(self, length: int, max_tokens: int, **options: object) -> None:
        """Add a request, its prompt likely to begin like others."""
        prompt = [1] * self.rng.randint(0, length - 1)
        prompt += self.rng.choices(range(1, VOCABULARY), k=length - len(prompt))
        size, pages = self.scheduler.pool.page_size, self.scheduler.pool.n_pages
        if -(-max(length, length + max_tokens - 1) // size) > pages:
            with pytest.raises(BadInput, match="pages of the cache, which has"):
                self.scheduler.add(prompt, max_tokens, **options)
            return
        try:
            sequences = self.scheduler.add(prompt, max_tokens, **options)
        except QueueFull:
            self.happened["queue full"] += 1
            return
        self.live += sequences
        if options.get("prompt_logprobs"):
            self.scored.append(sequences[0])

    def cancel(self, place: int) -> None:
        if self.live:
            sequence = self.live.pop(place % len(self.live))
            ended = sequence.state == "ended"
            assert self.scheduler.cancel(sequence) is not ended
            assert not self.scheduler.cancel(sequence)

    def step(self, cancelled: list[int] = ()) -> Step:
        """Do a step; ``cancelled`` are cancelled before its results arrive."""
        self.now += 1
        step = self.scheduler.schedule(self.now)
        for sequence in step.expired:
            assert sequence.deadline <= self.now
            self.live.remove(sequence)
        assert all(s.deadline > self.now for s in self.live if s.state != "ended")
        self.scheduler.check()
        results = self.engine.compute(step)
        for place in cancelled:
            self.happened["cancelled in flight"] += bool(self.live)
            self.cancel(place)
            self.scheduler.check()
        self.engine.finish_step(step, *results)
        self.scheduler.check()
        return step

    def drain(self) -> None:
        """End everything: in time, with the right answers, every page free."""
        # The first in order gets on by a token at each step.
        most = sum(sequence.max_length + 1 for sequence in self.live)
        while not self.scheduler.idle:
            self.step()
            most -= 1
            assert most >= 0, "somebody starves"
        for sequence in self.live:
            assert sequence.state == "ended"
            expect_answer(sequence)
        for sequence in self.scored:
            if sequence in self.live:
                expected = rows(sequence.tokens[: sequence.prompt_length])
                assert self.engine.scores[sequence] == dict(enumerate(expected))
        pool = self.scheduler.pool
        assert pool.used == 0
        assert pool.free == pool.n_pages
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0)
        for name in ("prefix_hits", "forks", "preemptions", "expired"):
            self.happened[name] += getattr(stats, name)
        self.happened += self.engine.happened


def random_load(seed: int) -> Counter[str]:
    """Run a load where everything is drawn from the seed; return what happened."""
    rng = random.Random(seed)
    running = rng.choice((1, 2, 4, 8))
    some = scheduler(
        rng.choice((5, 8, 12, 30)), rng.choice((1, 2, 3, 4, 8)), reuse=rng.random() < 0.8,
        max_running=running, max_step_tokens=running + rng.choice((0, 1, 5, 50)),
        prefill_chunk=rng.choice((1, 3, 100)), max_waiting=rng.choice((4, 20)),
        max_waiting_tokens=rng.choice((30, 500)), recompute=rng.choice((0, 1)),
    )  # fmt: skip
    load = Load(Engine(some, rng, depth=rng.choice((0, 1, 4))), rng)
    priorities = rng.choice(((0,), (0, 0, 1)))
    for _ in range(rng.randint(5, 60)):
        if rng.random() < 0.5:
            load.add(
                rng.randint(1, 20), rng.randint(0, 12), n=rng.choice((1, 1, 1, 2, 4)),
                priority=rng.choice(priorities), salt=rng.choice((b"", b"", b"other")),
                deadline=load.now + rng.choice((3, 30, float("inf"), float("inf"))),
                prompt_logprobs=rng.random() < 0.2,
            )  # fmt: skip
        if rng.random() < 0.05:
            load.cancel(rng.randrange(100))
        if rng.random() < 0.8:
            load.step([rng.randrange(100)] if rng.random() < 0.05 else [])
    load.drain()
    return load.happened


def test_every_answer_is_its_own_and_every_page_comes_back() -> None:
    """Whatever the limits, chunks, pool, preemption, prefix hits, drafts, n, cancellations."""
    happened: Counter[str] = Counter()
    for seed in range(300):
        happened += random_load(seed)
    wanted = (
        "prefix_hits", "forks", "preemptions", "expired", "accepted", "rejected", "queue full",
        "cancelled in flight",
    )  # fmt: skip
    assert min(happened[what] for what in wanted) > 100, happened


class Machine(RuleBasedStateMachine):
    """The same, chosen and made small by hypothesis."""

    @initialize(
        n_pages=st.integers(1, 10), page_size=st.integers(1, 4), max_running=st.integers(1, 4),
        more=st.integers(0, 8), chunk=st.integers(1, 8), recompute=st.integers(0, 1),
        depth=st.integers(0, 3), reuse=st.booleans(), seed=st.integers(0, 10**6),
    )  # fmt: skip
    def start(
        self, n_pages: int, page_size: int, max_running: int, more: int, chunk: int, recompute: int,
        depth: int, reuse: bool, seed: int,
    ) -> None:  # fmt: skip
        some = scheduler(
            n_pages, page_size, reuse=reuse, max_running=max_running, prefill_chunk=chunk,
            max_step_tokens=max_running + more, max_waiting=6, recompute=recompute,
        )  # fmt: skip
        rng = random.Random(seed)
        self.load = Load(Engine(some, rng, depth), rng)

    @rule(
        length=st.integers(1, 12), max_tokens=st.integers(0, 8), n=st.integers(1, 3),
        priority=st.integers(0, 1), salt=st.sampled_from((b"", b"a")), late=st.integers(1, 60),
        prompt_logprobs=st.booleans(),
    )  # fmt: skip
    def add(self, late: int, **options: object) -> None:
        deadline = self.load.now + late if late < 10 else float("inf")
        self.load.add(**options, deadline=deadline)

    @precondition(lambda self: self.load.live)
    @rule(place=st.integers(0, 9))
    def cancel(self, place: int) -> None:
        self.load.cancel(place)

    @rule(cancelled=st.lists(st.integers(0, 9), max_size=2))
    def step(self, cancelled: list[int]) -> None:
        self.load.step(cancelled)

    @rule(count=st.integers(2, 5))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.load.step()

    def teardown(self) -> None:
        if hasattr(self, "load"):
            self.load.drain()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


@settings(max_examples=100)
@given(
    st.integers(0, 10**6), st.integers(3, 30), st.integers(1, 5), st.integers(1, 6),
    st.integers(1, 9), st.integers(0, 4), st.integers(0, 1), st.booleans(),
)  # fmt: skip
def test_limits_do_not_change_answers(
    seed: int, n_pages: int, page_size: int, running: int, chunk: int, depth: int, recompute: int,
    reuse: bool,
) -> None:  # fmt: skip
    """The same requests as always, everything else drawn."""
    some = scheduler(
        n_pages, page_size, reuse=reuse, max_running=running, max_step_tokens=running + chunk,
        prefill_chunk=chunk, recompute=recompute,
    )  # fmt: skip
    load = Load(Engine(some, random.Random(seed), depth), random.Random(7))
    for length, max_tokens, n in (
        (9, 6, 1),
        (4, 9, 3),
        (9, 3, 2),
        (1, 7, 1),
        (12, 1, 1),
        (8, 0, 1),
    ):
        load.add(length, max_tokens, n=n)
    load.drain()
