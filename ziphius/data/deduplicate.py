"""Copies: texts that are equal, and texts that are nearly so.

Two texts are near copies if the estimated Jaccard similarity of their shingles (sequences of
``WORDS`` words) reaches a threshold. MinHash estimates it: of ``HASHES`` random orders of all
shingles, the share in which both texts have the same first one. Locality-sensitive hashing finds
the pairs worth comparing: those that agree in a whole band of orders.

Documents are taken by source and name, and each is compared with the ones that stay, so that every
near copy is close to a document that is still there. The order in which they were read, or who read
them, changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

WORDS = 5
HASHES = 256
SEED = 1
# Of pairs exactly at the threshold, how many may be missed.
_MISSED = 0.005

# An ideograph or a kana is a word of its own: such text has no blanks.
_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W\u3040-\u30ff\u3400-\u9fff]+")
_CHARACTERS_AT_ONCE = 2**22
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(32)

Fingerprints = NDArray[np.uint32]


def words_of(text: str) -> list[str]:
    """Return the words of a text; punctuation and white space are none."""
    return _WORD.findall(text)


def fingerprint(text: str) -> bytes:
    """Return the ``HASHES`` MinHash values of a text as little-endian uint32.

    Empty for a text of fewer than ``WORDS`` words: so little text is a copy only if it is equal.
    """
    minhash = RMinHash(HASHES, SEED)
    found = False
    for shingles in _shingles(text):
        minhash.update(shingles)
        found = True
    return np.array(minhash.digest(), dtype="<u4").tobytes() if found else b""


def _shingles(text: str) -> Iterator[list[str]]:
    """Yield all sequences of ``WORDS`` words, some at a time: a long text makes very many."""
    last: list[str] = []
    for part in _parts(text):
        words = last + words_of(part)
        if shingles := [" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)]:
            yield shingles
        last = words[max(0, len(words) - WORDS + 1) :]


def _parts(text: str) -> Iterator[str]:
    """Cut a text between words."""
    start = 0
    while start < len(text):
        stop = start + _CHARACTERS_AT_ONCE
        while stop < len(text) and not text[stop].isspace():
            stop += 1
        yield text[start:stop]
        start = stop


def exact_copies(digests: Sequence[bytes]) -> dict[int, int]:
    """Map every index whose digest appeared before to the first index that has it."""
    first: dict[bytes, int] = {}
    copies = {}
    for index, digest in enumerate(digests):
        original = first.setdefault(digest, index)
        if original != index:
            copies[index] = original
    return copies


def near_copies(
    prints_NP: Fingerprints, threshold: float
) -> Iterator[tuple[int, tuple[int, float] | None]]:
    """Yield for every row, in order, the kept row it copies and their similarity, or None.

    ``prints_NP`` has a fingerprint a row. A row is kept unless its estimated similarity with a kept
    row before it is at least ``threshold``; it is said to copy the most similar of those.
    """
    shared = _Buckets(prints_NP, threshold)
    for row in range(len(prints_NP)):
        candidates = shared.rows_beside(row)
        if candidates:
            similarities = (prints_NP[candidates] == prints_NP[row]).mean(axis=1)
            best = int(similarities.argmax())
            if similarities[best] >= threshold:
                yield row, (candidates[best], float(similarities[best]))
                continue
        shared.add(row)
        yield row, None


class _Buckets:
    """The kept rows by the bands of their fingerprints.

    Bands that no two rows share are left out: those of a corpus without copies take no memory.
    """

    def __init__(self, prints_NP: Fingerprints, threshold: float) -> None:
        width = band_width(threshold)
        self._buckets: dict[tuple[int, int], list[int]] = {}
        self._keys: dict[int, list[tuple[int, int]]] = {}
        for band, start in enumerate(range(0, HASHES - width + 1, width)):
            keys_N = _hash_rows(prints_NP[:, start : start + width])
            _, place_N, counts = np.unique(keys_N, return_inverse=True, return_counts=True)
            for row in np.flatnonzero(counts[place_N] > 1).tolist():
                self._keys.setdefault(row, []).append((band, int(keys_N[row])))

    def rows_beside(self, row: int) -> list[int]:
        """Return the kept rows that agree with ``row`` in some band, in order."""
        keys = self._keys.get(row, ())
        return sorted({other for key in keys for other in self._buckets.get(key, ())})

    def add(self, row: int) -> None:
        for key in self._keys.get(row, ()):
            self._buckets.setdefault(key, []).append(row)


def band_width(threshold: float) -> int:
    """Return how many values make a band: the most that miss few pairs at the threshold."""
    for width in range(HASHES, 1, -1):
        bands = HASHES // width
        if (1 - threshold**width) ** bands <= _MISSED:
            return width
    return 1


def _hash_rows(values_NR: Fingerprints) -> NDArray[np.uint64]:
    """Hash every row to one number. Rows that collide are compared in vain, nothing more."""
    hashes_N = np.zeros(len(values_NR), dtype=np.uint64)
    for column_N in values_NR.T:
        hashes_N = (hashes_N ^ column_N) * _FACTOR
        hashes_N ^= hashes_N >> _SHIFT
    return hashes_N
