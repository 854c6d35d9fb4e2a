"""Random numbers that depend on names alone: equal on every machine, in every order.

Each number is a hash of a purpose, the seed and what it is drawn for, in 64-bit integer arithmetic
written out here, so that no library's generator can change a run that is to be repeated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_WORD = 2**64
_STEP = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
_FACTORS = np.array([[0xBF58476D1CE4E5B9], [0x94D049BB133111EB]], dtype=np.uint64)


def draw(purpose: str, seed: int, *names: int | NDArray[np.integer]) -> Hashes:
    """Return a 64-bit number, uniform over all of them, for every element of the names.

    ``purpose`` has at most eight ASCII characters. Names are integers or arrays of integers that
    broadcast; what comes back has at least one dimension. Names that differ in one place only give
    different numbers.
    """
    hashes = _mix(_words(int.from_bytes(purpose.encode("ascii"), "little")))
    for name in (seed, *names):
        if isinstance(name, int):
            for word in _split(name):
                hashes = _mix(hashes ^ _words(word))
        else:
            hashes = _mix(hashes ^ name.astype(np.uint64))
    return hashes


def happens(hashes: Hashes, rate: float) -> NDArray[np.bool_]:
    """Say for every number whether an event of probability ``rate`` happens."""
    return (hashes >> np.uint64(11)) < np.uint64(round(rate * 2**53))


def _mix(words: Hashes) -> Hashes:
    """Apply the finaliser of SplitMix64, a bijection; arrays wrap around silently."""
    words = words + _STEP
    words = (words ^ (words >> np.uint64(30))) * _FACTORS[0]
    words = (words ^ (words >> np.uint64(27))) * _FACTORS[1]
    return words ^ (words >> np.uint64(31))


def _words(word: int) -> Hashes:
    return np.array([word], dtype=np.uint64)


def _split(number: int) -> list[int]:
    """Return the 64-bit words of a number, the lowest first, at least one."""
    words = [number % _WORD]
    while number := number // _WORD:
        words.append(number % _WORD)
    return words
