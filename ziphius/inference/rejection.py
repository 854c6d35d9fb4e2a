"""Standard speculative rejection: drafts change the speed of an answer, not its distribution.

``p_V`` is what the model would draw the next token from, ``q_V`` what the draft was drawn from,
both ``[V]`` in float64 and summing to 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ziphius.inference.noise import Noise, Stream

Shares = NDArray[np.float64]


class Verified(NamedTuple):
    """The token that stands at a draft's place, and whether it is the draft."""

    token: int
    accepted: bool


def acceptance(p_V: Shares, q_V: Shares, draft: int) -> float:
    """Return the probability to accept a draft: ``min(1, p / q)`` of its token."""
    return float(min(1.0, p_V[draft] / q_V[draft])) if q_V[draft] > 0 else float(p_V[draft] > 0)


def residual(p_V: Shares, q_V: Shares) -> Shares:
    """Return what a rejected draft's place is drawn from: the excess of ``p`` over ``q``."""
    excess_V = np.maximum(p_V - q_V, 0.0)
    total = excess_V.sum()
    # No excess means that p is q: a rejection then comes of rounding alone.
    return excess_V / total if total > 0 else p_V


def verify(p_V: Shares, q_V: Shares, draft: int, noise: Noise, position: int) -> Verified:
    """Accept the draft, or draw another token: the result is distributed as ``p_V``."""
    if noise.uniform(position, Stream.ACCEPT) < acceptance(p_V, q_V, draft):
        return Verified(draft, True)
    return Verified(draw(residual(p_V, q_V), noise, position, Stream.RESIDUAL), False)


def draw(p_V: Shares, noise: Noise, position: int, stream: Stream) -> int:
    """Draw a token from a distribution, by the noise of one position and use."""
    tokens_N = np.flatnonzero(p_V)
    waits_N = noise.exponentials(position, len(p_V), tokens_N, stream) / p_V[tokens_N]
    return int(tokens_N[waits_N.argmin()])
