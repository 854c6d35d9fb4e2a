"""What a network must beat: a compressor and a byte n-gram model, in bits per byte."""

from __future__ import annotations

import lzma
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ziphius.config.errors import BadInput

Grams = NDArray[np.uint64]
Floats = NDArray[np.float64]

_BYTE = np.uint64(8)
# An n-gram is packed in 64 bits, its first byte highest.
MAX_ORDER = 8

# Discounts of counts 1, 2 and 3 or more where the counts are too few to estimate them from, and
# the bounds that keep every estimate usable: above 0, so that no byte is impossible, and below
# the count itself.
_FALLBACK_DISCOUNTS = np.array([0.0, 0.5, 0.5, 0.5])
_LEAST_DISCOUNTS = np.array([0.0, 0.1, 0.1, 0.1])
_MOST_DISCOUNTS = np.array([0.0, 0.9, 1.9, 2.9])


def xz_bits_per_byte(text: bytes) -> float:
    """Return the size of ``text`` packed by xz at its best setting, in bits per byte of text.

    The packer sees this text alone. Raises BadInput for an empty text.
    """
    _require_text(text, "to compress")
    packed = lzma.compress(text, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(packed) / len(text)


@dataclass(frozen=True)
class _Table:
    """One order: its n-grams and its contexts, both sorted."""

    grams: Grams
    direct: Floats  # discounted share of the n-gram in its context
    contexts: Grams
    backoff: Floats  # what discounting left for the order below


class NgramModel:
    """A byte n-gram model with interpolated modified Kneser-Ney smoothing.

    Chen and Goodman 1999, section 3: the highest order counts bytes, a lower order counts the
    distinct bytes that its n-grams follow; each order keeps three discounts from its own counts
    of counts and gives what they free to the order below, down to 1/256 for every byte.
    """

    def __init__(self, text: bytes, order: int = 6) -> None:
        """Count ``text``; a byte is predicted from the ``order - 1`` bytes before it.

        Raises BadInput for an empty text or an order outside 1 to 8.
        """
        _require_text(text, "to count n-grams in")
        if not 1 <= order <= MAX_ORDER:
            raise BadInput(f"n-gram order {order}: use an order from 1 to {MAX_ORDER}")
        self.order = order
        self._tables: list[_Table] = []
        highest = min(order, len(text))  # a shorter text has no n-grams of the orders above
        occurrences = _pack(text, highest)
        for n in range(highest, 0, -1):
            grams, counts = _count(occurrences)
            self._tables.insert(0, _table(grams, counts))
            # Each distinct n-gram says once which (n-1)-gram its first byte came before. The
            # text's first n bytes are one too, though nothing before them may have counted them.
            distinct = np.union1d(grams, _pack(text[:n], n))
            occurrences = distinct & np.uint64((1 << 8 * (n - 1)) - 1)

    def bits_per_byte(self, text: bytes) -> float:
        """Return the mean of -log2 p(byte | the bytes before it in ``text``).

        Raises BadInput for an empty text.
        """
        _require_text(text, "to predict")
        probabilities = np.full(len(text), 1 / 256)
        for n, table in enumerate(self._tables, start=1):
            known = probabilities[n - 1 :]
            known[:] = _interpolate(table, _pack(text, n), known)
        return float(-np.log2(probabilities).mean())

    def next_byte(self, context: bytes) -> Floats:
        """Return the probability of each of the 256 bytes after ``context``, float64 [256]."""
        probabilities = np.full(256, 1 / 256)
        following = np.arange(256, dtype=np.uint64)
        for n, table in enumerate(self._tables[: len(context) + 1], start=1):
            history = int.from_bytes(context[len(context) - (n - 1) :], "big")
            grams = following | np.uint64(history << 8)
            probabilities = _interpolate(table, grams, probabilities)
        return probabilities


def _pack(text: bytes, n: int) -> Grams:
    """Return every run of ``n`` bytes as one number each; none if the text is shorter."""
    values = np.frombuffer(text, dtype=np.uint8).astype(np.uint64)
    grams = values
    for i in range(1, n):
        grams = (grams[:-1] << _BYTE) | values[i:]
    return grams


def _count(occurrences: Grams) -> tuple[Grams, NDArray[np.int64]]:
    ordered = np.sort(occurrences)
    starts = _starts(ordered)
    return ordered[starts], np.diff(starts, append=len(ordered))


def _starts(ordered: Grams) -> NDArray[np.int64]:
    """Return where each run of equal values begins."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def _table(grams: Grams, counts: NDArray[np.int64]) -> _Table:
    contexts = grams >> _BYTE
    starts = _starts(contexts)
    sizes = np.diff(starts, append=len(grams))
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    totals = np.add.reduceat(counts, starts)
    freed = np.add.reduceat(discounts, starts)
    direct = (counts - discounts) / np.repeat(totals, sizes)
    return _Table(grams, direct, contexts[starts], freed / totals)


def _discounts(counts: NDArray[np.int64]) -> Floats:
    """Return what counts of 0, 1, 2 and at least 3 lose (Chen and Goodman 1999, equation 26)."""
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in range(1, 5))
    if not (n1 and n2 and n3):
        return _FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    estimates = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(estimates, _LEAST_DISCOUNTS, _MOST_DISCOUNTS)


def _interpolate(table: _Table, grams: Grams, below: Floats) -> Floats:
    """Return the probability of each n-gram's last byte, given the order below's.

    A context that was never seen leaves the order below as it is.
    """
    context, seen = _find(table.contexts, grams >> _BYTE)
    gram, hit = _find(table.grams, grams)
    direct = np.where(hit, table.direct[gram], 0.0)
    return np.where(seen, direct + table.backoff[context] * below, below)


def _find(ordered: Grams, wanted: Grams) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the place of each wanted value, and whether it is there."""
    places = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return places, ordered[places] == wanted


def _require_text(text: bytes, purpose: str) -> None:
    if not text:
        raise BadInput(f"baseline: the text {purpose} is empty: give at least one byte")
