"""What a level's requests add up to: times in mean and percentiles, rates, goodput, failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ziphius.serving.bench.outcome import Outcome

PERCENTS = (50, 90, 99, 100)


class Spread(NamedTuple):
    """How times are spread, in seconds. Percentiles lie between neighbours in proportion."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Goal:
    """What a request must keep, in seconds: the time to its first token, and its mean time between
    tokens. None is no limit.
    """

    ttft: float | None = None
    itl: float | None = None

    def met(self, outcome: Outcome) -> bool:
        """Say whether a request was answered, and as fast as is wanted.

        Between the tokens of an answer of one chunk there is no time, so it keeps that limit.
        """
        if not outcome.answered or outcome.first is None:
            return False
        fast = self.ttft is None or outcome.first <= self.ttft
        return fast and (self.itl is None or (outcome.per_token or 0.0) <= self.itl)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A level's figures. Times and rates are those of answered requests alone.

    ``seconds`` is from the first request's beginning to the last one's end, ``busy`` the share of
    it that the generator computed. ``failures`` counts by kind, ``examples`` has a message of each;
    ``refused`` are the requests that 429 or 503 kept from an answer and are no failures,
    ``refusals`` all such responses, and ``hints`` those with Retry-After. ``usage`` requests were
    counted by the server, the others by their chunks. ``late`` is how long after their time
    requests were sent.
    """

    concurrency: int | None
    rate: float | None
    seconds: float
    requests: int
    answered: int
    refused: int
    refusals: int
    hints: int
    failures: dict[str, int]
    examples: dict[str, str]
    usage: int
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    goodput: float
    ttft: Spread | None
    itl: Spread | None
    per_token: Spread | None
    end_to_end: Spread | None
    late: Spread | None
    busy: float

    @property
    def failed(self) -> int:
        """Requests that failed, refusals apart."""
        return sum(self.failures.values())


def spread(values: Sequence[float], weights: Sequence[int] | None = None) -> Spread | None:
    """Return the spread of values, each there ``weights`` times; None for no value."""
    many = np.asarray(values, dtype=np.float64)
    if weights is not None:
        many = np.repeat(many, weights)
    if not many.size:
        return None
    # A mean of equal numbers may end a rounding above the largest.
    mean = float(np.clip(many.mean(), many.min(), many.max()))
    return Spread(mean, *(float(p) for p in np.percentile(many, PERCENTS)))


def summarise(
    outcomes: Sequence[Outcome],
    *,
    goal: Goal,
    busy: float,
    concurrency: int | None = None,
    rate: float | None = None,
) -> Summary:
    """Return the figures of a level's requests."""
    answered = [outcome for outcome in outcomes if outcome.answered]
    began = min(outcome.began for outcome in outcomes)
    seconds = max(max(outcome.ended for outcome in outcomes) - began, 1e-9)
    faults = [o.fault for o in outcomes if o.fault is not None and not o.refused]
    gaps = [gap for outcome in answered for gap in outcome.gaps]
    cached = [o.cached_tokens for o in answered if o.cached_tokens is not None]
    tokens = sum(outcome.output_tokens for outcome in answered)
    return Summary(
        concurrency=concurrency,
        rate=rate,
        seconds=seconds,
        requests=len(outcomes),
        answered=len(answered),
        refused=sum(outcome.refused for outcome in outcomes),
        refusals=sum(outcome.refusals for outcome in outcomes),
        hints=sum(outcome.hints for outcome in outcomes),
        failures=dict(Counter(fault.kind for fault in faults)),
        examples={fault.kind: fault.message for fault in reversed(faults)},
        usage=sum(outcome.counted == "usage" for outcome in answered),
        prompt_tokens=sum(outcome.prompt_tokens or 0 for outcome in answered),
        cached_tokens=sum(cached) if cached else None,
        output_tokens=tokens,
        output_tokens_per_s=tokens / seconds,
        requests_per_s=len(answered) / seconds,
        goodput=sum(map(goal.met, outcomes)) / seconds,
        ttft=spread([o.first for o in answered if o.first is not None]),
        itl=spread([gap.seconds for gap in gaps], [gap.tokens for gap in gaps]),
        per_token=spread([o.per_token for o in answered if o.per_token is not None]),
        end_to_end=spread([outcome.seconds for outcome in answered]),
        late=None if rate is None else spread([outcome.late for outcome in outcomes]),
        busy=busy,
    )
