"""Randomness as a function of names: a request's seed, which of its answers, and the position.

A counter-based generator (Philox) is the function, so any position's numbers can be had at any
time, in any order and process: no state is kept, lost or shared.
"""

from __future__ import annotations

import enum
import secrets

import numpy as np
from numpy.typing import NDArray

_WORDS = 4  # 64-bit numbers that Philox makes of one count
# So many tokens' numbers are had one by one; for more it is faster to draw everybody's.
_FEW = 100


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
        return -np.log(_uniform(words))

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


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Turn words into numbers between 0 and 1; 52 bits, so that neither end is met."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def fresh_seed() -> int:
    """Return a seed for a request that gave none."""
    return secrets.randbelow(2**63)
