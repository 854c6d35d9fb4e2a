"""Documents into rows with few truncations: best-fit packing (report 4.1, facts 6.2)."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Stretches of documents: int64, one element a piece, in the documents' order."""

    document: Integers
    start: Integers
    length: Integers


def cut(lengths: Integers, row: int) -> Pieces:
    """Cut documents that are longer than a row of ``row`` tokens, T + 1.

    Consecutive pieces of a document share their border token, the last of one piece and the first
    of the next; all but the last piece are exactly a row. Where every token of a piece but its
    first is a target, every token of a document but its first is a target exactly once.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    step = row - 1
    counts = np.where(lengths > 0, np.maximum(1, -(-(lengths - 1) // step)), 0)
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(document)) - first) * step
    return Pieces(document, start, np.minimum(row, lengths[document] - start))


def best_fit(lengths: Integers, row: int) -> Integers:
    """Return the row of every piece; rows are counted from 0 and hold ``row`` tokens.

    No piece is longer than a row or empty.

    Pieces go from the longest to the shortest into the row with the least room that is enough; a
    new row is begun when there is none. Pieces of one length are placed together: the row with the
    least room takes as many as fit, because with one more piece it still has the least. The cost
    is that of sorting, and of a step for every pair of a length and a room that meet.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    borders = np.flatnonzero(np.diff(lengths[order])) + 1
    placed, rooms = np.empty(len(lengths), dtype=np.int64), _Rooms(row)
    for pieces in np.split(order, borders) if len(order) else ():
        length = int(lengths[pieces[0]])
        while len(pieces):
            room, rows = rooms.take(length, len(pieces))
            each = room // length
            used = min(len(rows), -(-len(pieces) // each))
            now = min(len(pieces), used * each)
            placed[pieces[:now]] = np.repeat(rows[:used], each)[:now]
            last = now - (used - 1) * each
            rooms.put(room - each * length, rows[: used - 1])
            rooms.put(room - last * length, rows[used - 1 : used])
            rooms.put(room, rows[used:])
            pieces = pieces[now:]
    return placed


class _Rooms:
    """The rows that are not full, by how many tokens still go in."""

    def __init__(self, row: int) -> None:
        self._row = row
        self._begun = 0
        self._sizes: list[int] = []
        self._rows: dict[int, Integers] = {}

    def take(self, length: int, pieces: int) -> tuple[int, Integers]:
        """Take out all rows of the least room for ``length``; new ones when there are none."""
        at = bisect_left(self._sizes, length)
        if at < len(self._sizes):
            room = self._sizes.pop(at)
            return room, self._rows.pop(room)
        new = -(-pieces // (self._row // length))
        self._begun += new
        return self._row, np.arange(self._begun - new, self._begun)

    def put(self, room: int, rows: Integers) -> None:
        if room == 0 or not len(rows):
            return
        if room in self._rows:
            self._rows[room] = np.concatenate((self._rows[room], rows))
        else:
            insort(self._sizes, room)
            self._rows[room] = rows
