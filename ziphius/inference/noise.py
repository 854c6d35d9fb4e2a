"""Randomness as a function of names: a request's seed, which of its answers, and the position.

A counter-based generator (Philox) is the function, so any position's numbers can be had at any
time, in any order and process: no state is kept, lost or shared.
"""

from __future__ import annotations

import enum
import math
import secrets

import numpy as np
from numpy.typing import NDArray

from ziphius.inference.logits import BLOCK, Row
from ziphius.kernels.draw import Name

_WORDS = 4  # 64-bit numbers that Philox makes of one count
# So many tokens' numbers are had one by one; for more it is faster to draw everybody's.
_FEW = 100
# Gumbel noise above this has a word above that: one token in 400.
_COMMON = 6.0
_RARE = np.uint64(math.exp(-math.exp(-_COMMON)) * 2.0**64 * (1 - 1e-9))


class Stream(enum.IntEnum):
    """What a number is for: each use has numbers of its own."""

    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


class Noise:
    """The random numbers of one answer: the ``index``-th of a request with ``seed``."""

    def __init__(self, seed: int, index: int = 0) -> None:
        self.seed, self.index = seed, index

    def exponentials(
        self,
        position: int,
        vocab_size: int,
        tokens_N: NDArray[np.intp] | None = None,
        stream: Stream = Stream.TOKEN,
    ) -> NDArray[np.float64]:
        """Draw a number from Exp(1) for each of ``tokens_N``, or for the whole vocabulary.

        ``-log`` of them is Gumbel noise. A token's number does not depend on the other tokens.
        """
        philox = self._philox(position, stream)
        if tokens_N is None:
            words = philox.random_raw(vocab_size)
        elif len(tokens_N) > _FEW:
            words = philox.random_raw(int(tokens_N.max()) + 1)[tokens_N]
        else:
            words = _words(philox, tokens_N.tolist())
        return _exponential(words)

    def race(self, position: int, logits_V: Row, temperature: float) -> int:
        """Return the argmax over the whole vocabulary of ``logits / temperature`` plus noise.

        Most tokens cannot win: their logit is too far below the largest, and their noise is not of
        the rare large kind. Only the others' scores are computed.
        """
        best = int(logits_V.argmax())
        top = float(logits_V[best])
        philox = self._philox(position, Stream.TOKEN)
        if len(logits_V) <= BLOCK:
            drawn_V = philox.random_raw(len(logits_V))
            word = drawn_V[best : best + 1]
        else:
            drawn_V = None
            word = _words(philox, [best])
            philox = self._philox(position, Stream.TOKEN)
        reached = -float(np.log(_exponential(word))[0])
        # With room for rounding, which the factor of the noise's bound leaves too.
        near = top + temperature * (reached - _COMMON - 1e-6) - 1e-6 * abs(top)
        runs, drawn = [], []
        with np.errstate(over="ignore"):  # a bound of minus infinity is one that all reach
            for start in range(0, len(logits_V), BLOCK):
                block = logits_V[start : start + BLOCK]
                words = philox.random_raw(len(block)) if drawn_V is None else drawn_V
                places = np.flatnonzero((block >= near) | (words > _RARE))
                runs.append(places + start)
                drawn.append(words[places])
        runs_N = np.concatenate(runs)
        with np.errstate(over="ignore"):
            scores_N = (logits_V[runs_N].astype(np.float64) - top) / temperature
        scores_N -= np.log(_exponential(np.concatenate(drawn)))
        return int(runs_N[scores_N.argmax()])

    def name(self, position: int) -> Name:
        """Return what a kernel is to know of the noise of a token."""
        return Name(self.seed, position, self.index)

    def uniform(self, position: int, stream: Stream) -> float:
        """Draw one number between 0 and 1, neither of them."""
        return float(_uniform(self._philox(position, stream).random_raw(1))[0])

    def _philox(self, position: int, stream: Stream) -> np.random.Philox:
        key = np.array([self.seed, position], np.uint64)
        counter = np.array([0, 0, stream, self.index], np.uint64)
        return np.random.Philox(key=key, counter=counter)


def _words(philox: np.random.Philox, places: list[int]) -> NDArray[np.uint64]:
    """Read the generator's words at ``places`` without making those between."""
    found, count = [], 0
    for place in places:
        wanted, skipped = divmod(place, _WORDS)
        philox.advance(wanted - count)
        for _ in range(skipped):
            philox.random_raw()
        found.append(philox.random_raw())
        count = wanted + 1
    return np.array(found, np.uint64)


def _exponential(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    return -np.log(_uniform(words))


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Turn words into numbers between 0 and 1; 52 bits, so that neither end is met."""
    # As signed numbers, which processors convert many times faster.
    numbers = (words >> np.uint64(12)).view(np.int64).astype(np.float64)
    numbers += 0.5
    numbers *= 2.0**-52
    return numbers


def fresh_seed() -> int:
    """Return a seed for a request that gave none."""
    return secrets.randbelow(2**63)
