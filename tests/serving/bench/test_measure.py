"""Means, percentiles, rates and goodput."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.serving.bench.measure import Goal, spread, summarise
from ziphius.serving.bench.outcome import Gap, Outcome
from ziphius.serving.bench.stream import Fault

SECONDS = st.floats(1e-6, 1e4)
WEIGHTED = st.lists(st.tuples(SECONDS, st.integers(1, 4)), min_size=1, max_size=30)


def outcome(
    first: float = 1.0, gap: float = 0.1, tokens: int = 5, *, began: float = 0.0, prompt: int = 0,
    fault: Fault | None = None,
) -> Outcome:  # fmt: skip
    last = first + gap * (tokens - 1)
    return Outcome(
        prompt=prompt, began=began, ended=began + last, first=first, last=last, fault=fault,
        gaps=(Gap(gap, tokens - 1),) if tokens > 1 else (), output_tokens=tokens, prompt_tokens=7,
    )  # fmt: skip


# --- spreads --------------------------------------------------------------------------------------


def between(ordered: list[float], percent: float) -> float:
    """The definition: a place in the order, in proportion between two neighbours."""
    place = percent / 100 * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@given(WEIGHTED)
def test_a_spread_is_that_of_every_token(weighted: list[tuple[float, int]]) -> None:
    found = spread([v for v, _ in weighted], [w for _, w in weighted])
    ordered = sorted(v for v, w in weighted for _ in range(w))
    assert found is not None
    assert found.mean == pytest.approx(float(np.mean(ordered)))
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert getattr(found, name) == pytest.approx(between(ordered, percent))
        assert getattr(found, name) == pytest.approx(float(np.percentile(ordered, percent)))
    assert found.max == ordered[-1]


@given(WEIGHTED, st.randoms(use_true_random=False))
def test_laws_of_a_spread(weighted: list[tuple[float, int]], chance: object) -> None:
    values, weights = zip(*weighted, strict=True)
    found = spread(values, weights)
    assert found is not None
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= found.max == max(values)
    assert min(values) <= found.mean <= max(values)
    shuffled = list(weighted)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert spread(*zip(*shuffled, strict=True)) == pytest.approx(found)  # type: ignore[arg-type]
    doubled = spread([2 * value for value in values], weights)
    assert doubled == pytest.approx([2 * part for part in found])


def test_of_nothing_there_is_no_spread() -> None:
    assert spread([]) is None
    assert spread([], []) is None


# --- goodput --------------------------------------------------------------------------------------

OUTCOMES = st.lists(
    st.builds(
        outcome, st.floats(0.01, 5), st.floats(0.001, 1), st.integers(1, 9),
        began=st.floats(0, 10), fault=st.sampled_from([None, None, Fault("timeout", "late")]),
    ),
    min_size=1, max_size=12,
)  # fmt: skip
LIMIT = st.none() | st.floats(0.001, 6)


@given(OUTCOMES, LIMIT, LIMIT, st.floats(1, 4))
def test_laws_of_goodput(
    outcomes: list[Outcome], ttft: float | None, itl: float | None, more: float
) -> None:
    def goodput(goal: Goal) -> float:
        return summarise(outcomes, goal=goal, busy=0.0, concurrency=1).goodput

    everything = summarise(outcomes, goal=Goal(), busy=0.0, concurrency=1)
    assert everything.goodput == everything.requests_per_s
    strict = goodput(Goal(ttft, itl))
    assert 0 <= strict <= everything.requests_per_s
    wider = Goal(ttft and ttft * more, itl and itl * more)
    assert strict <= goodput(wider) <= everything.goodput
    assert strict <= min(goodput(Goal(ttft, None)), goodput(Goal(None, itl)))
    assert strict * everything.seconds == pytest.approx(
        sum(
            o.answered
            and (ttft is None or (o.first or 0) <= ttft)
            and (itl is None or (o.per_token or 0) <= itl)
            for o in outcomes
        )
    )


def test_a_goal_is_kept_on_its_limit() -> None:
    assert Goal(1.0, 0.1).met(outcome(1.0, 0.1, 2))
    assert not Goal(0.999, None).met(outcome(1.0))
    assert not Goal(None, 0.0999).met(outcome(gap=0.1))
    assert Goal(1.0, 1e-9).met(outcome(1.0, tokens=1))
    assert not Goal().met(outcome(fault=Fault("empty", "")))


# --- a level --------------------------------------------------------------------------------------


def test_a_level_in_figures() -> None:
    refused = Fault("refused", "429: full")
    outcomes = [
        outcome(1.0, 0.25, 5, began=10.0),
        outcome(2.0, 0.5, 3, began=11.0),
        replace(outcome(began=10.0), fault=refused, refusals=1, hints=1, output_tokens=0),
        replace(outcome(began=10.0), fault=Fault("timeout", "first")),
        replace(outcome(began=10.0), fault=Fault("timeout", "second")),
    ]
    s = summarise(outcomes, goal=Goal(1.5, None), busy=0.5, concurrency=2)
    assert s.seconds == pytest.approx(4.0)  # from 10 to 11 + 2 + 2 * 0.5
    assert (s.requests, s.answered, s.refused, s.failed) == (5, 2, 1, 2)
    assert (s.failures, s.examples) == ({"timeout": 2}, {"timeout": "first"})
    assert (s.output_tokens, s.prompt_tokens) == (8, 14)
    assert s.output_tokens_per_s == pytest.approx(2.0)
    assert s.requests_per_s == pytest.approx(0.5)
    assert s.goodput == pytest.approx(0.25)
    assert s.ttft is not None
    assert s.itl is not None
    assert s.per_token is not None
    assert s.ttft.mean == pytest.approx(1.5)
    assert s.itl.mean == pytest.approx((4 * 0.25 + 2 * 0.5) / 6)  # by token
    assert s.per_token.mean == pytest.approx(0.375)  # by request
    assert s.end_to_end is not None
    assert s.end_to_end.max == pytest.approx(3.0)
    assert (s.late, s.usage, s.cached_tokens, s.busy) == (None, 2, None, 0.5)
