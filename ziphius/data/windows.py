"""The text in windows: each is a stretch of an endless mixture, packed into shuffled rows.

A window's rows are a function of the seed, the window's number and the sources alone. So two
numbers say where a run is, and any thread can make any window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ziphius.data.fim import FillInTheMiddle
from ziphius.data.pack import Integers, Pieces, best_fit, cut
from ziphius.data.randomness import draw
from ziphius.data.rows import NO_DOCUMENT
from ziphius.data.token_split import TokenSplit
from ziphius.data.tokenizer import PAD_ID
from ziphius.data.tokens import Tokens

# An epoch's order is kept while windows touch it; there is one border between epochs at a time.
_ORDERS_KEPT = 2


class Stream:
    """A source's documents without end: epoch after epoch, each in an order of its own.

    The order depends on the seed, the epoch and the documents' keys alone.
    """

    def __init__(self, tokens: Tokens, seed: int) -> None:
        self.tokens = tokens
        self.tokens_per_epoch = int(np.sum(tokens.lengths, dtype=np.int64))
        self._seed = seed
        self._lock = Lock()
        self._orders: dict[int, tuple[Integers, Integers]] = {}

    def between(self, start: int, stop: int) -> tuple[Integers, Integers]:
        """Return the documents that begin in ``[start, stop)``, counted in tokens, in order.

        Two int64 arrays: their numbers in the source, and their epochs.
        """
        documents, epochs = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for epoch in range(start // self.tokens_per_epoch, -(-stop // self.tokens_per_epoch)):
            order, starts = self._order(epoch)
            offset = epoch * self.tokens_per_epoch
            first, last = np.searchsorted(starts, (start - offset, stop - offset))
            documents.append(order[first:last])
            epochs.append(np.full(last - first, epoch, dtype=np.int64))
        return np.concatenate(documents), np.concatenate(epochs)

    def _order(self, epoch: int) -> tuple[Integers, Integers]:
        """Return an epoch's documents in order, and where in the epoch each begins."""
        with self._lock:
            if epoch not in self._orders:
                hashes = draw("order", self._seed, epoch, self.tokens.keys)
                order = np.argsort(hashes, kind="stable")
                lengths = self.tokens.lengths[order]
                self._orders[epoch] = order, np.cumsum(lengths) - lengths
                for old in list(self._orders)[:-_ORDERS_KEPT]:
                    del self._orders[old]
            return self._orders[epoch]


@dataclass(frozen=True)
class Window:
    """A window's rows of ``S`` tokens, without their padding.

    ``tokens``: int32, all rows one behind the other. ``starts``: where each row begins in it, and
    one more for the end. ``pieces`` and ``piece_starts``: the lengths of the stretches of documents
    the rows consist of, and which of them is each row's first.
    """

    row: int
    tokens: NDArray[np.int32]
    starts: Integers
    pieces: Integers
    piece_starts: Integers

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.starts) - 1

    @property
    def padding(self) -> float:
        """The share of the rows' places that no token fills."""
        return 1 - len(self.tokens) / (self.rows * self.row) if self.rows else 0.0

    def fill(
        self, first: int, tokens_BS: NDArray[np.int64], documents_BS: NDArray[np.int32]
    ) -> None:
        """Write the rows from ``first`` on into two arrays, as many as these have."""
        last = first + len(tokens_BS)
        lengths = np.diff(self.starts[first : last + 1])
        filled = np.arange(self.row) < lengths[:, None]
        tokens_BS[:], documents_BS[:] = PAD_ID, NO_DOCUMENT
        tokens_BS[filled] = self.tokens[self.starts[first] : self.starts[last]]
        borders = self.piece_starts[first : last + 1]
        counts = np.diff(borders)
        number = np.arange(borders[0], borders[-1]) - np.repeat(borders[:-1], counts)
        documents_BS[filled] = np.repeat(number, self.pieces[borders[0] : borders[-1]])


class WindowMaker:
    """Makes windows of about ``window_tokens`` tokens, in which each source has its share.

    Every source gives window n the documents that begin in the n-th stretch of its stream; all
    stretches of a source are equally long, in proportion to its weight.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Tokens, float]],
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        seed: int,
        fim_rate: float,
        token_split_rate: float,
        window_tokens: int,
    ) -> None:
        self._row, self._seed = sequence_length + 1, seed
        self._streams = [Stream(tokens, seed) for tokens, _ in sources]
        whole = sum(weight for _, weight in sources)
        self._stretches = [max(1, round(window_tokens * w / whole)) for _, w in sources]
        self._fim = FillInTheMiddle(tokenizer, fim_rate, seed) if fim_rate else None
        self._split = TokenSplit(tokenizer, token_split_rate, seed) if token_split_rate else None

    def make(self, number: int) -> Window:
        """Make a window. It has no rows if no document begins in it, as one is longer than it."""
        documents: list[NDArray[np.int32]] = []
        keys, epochs = [], []
        for stream, stretch in zip(self._streams, self._stretches, strict=True):
            chosen, when = stream.between(number * stretch, (number + 1) * stretch)
            documents += map(stream.tokens.document, chosen.tolist())
            keys.append(stream.tokens.keys[chosen])
            epochs.append(when)
        key, epoch = np.concatenate(keys), np.concatenate(epochs)
        if self._fim is not None:
            documents = self._fim.apply(documents, key, epoch)
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        tokens = np.concatenate([np.empty(0, dtype=np.int32), *documents])
        if self._split is not None:
            tokens, lengths = self._split.apply(tokens, lengths, key, epoch)
        return self._rows(number, tokens, lengths)

    def _rows(self, number: int, tokens: NDArray[np.int32], lengths: Integers) -> Window:
        """Pack documents that lie one behind the other; shuffle what packing finds equal, and rows.

        So sources mix within rows, and no place in a row is one for short documents.
        """
        pieces = cut(lengths, self._row)
        mixed = self._shuffled("pieces", number, len(pieces.length))
        piece = pieces.length[mixed]
        row = best_fit(piece, self._row)
        count = int(row.max()) + 1 if len(row) else 0
        place = np.empty(count, dtype=np.int64)  # of every row in the shuffled order
        place[self._shuffled("rows", number, count)] = np.arange(count)
        # The order of ``mixed`` would not do: packing goes through each length in that order too.
        within = draw("in-row", self._seed, number, np.arange(len(row)))
        dealt = np.lexsort((within, place[row]))
        order = mixed[dealt]
        starts = (np.cumsum(lengths) - lengths)[pieces.document[order]] + pieces.start[order]
        stretches = zip(starts.tolist(), (starts + piece[dealt]).tolist(), strict=True)
        return Window(
            self._row,
            np.concatenate([np.empty(0, dtype=np.int32), *(tokens[a:b] for a, b in stretches)]),
            _borders(np.bincount(place[row], weights=piece, minlength=count)),
            piece[dealt],
            _borders(np.bincount(place[row], minlength=count)),
        )

    def _shuffled(self, purpose: str, number: int, count: int) -> Integers:
        """Return the numbers below ``count`` in an order of the window's own."""
        return np.argsort(draw(purpose, self._seed, number, np.arange(count)), kind="stable")


def rows_per_epoch(sources: Sequence[Tokens], row: int) -> int:
    """Return how many rows of ``row`` tokens one epoch of all sources gives, unchanged."""
    pieces: list[Pieces] = [cut(tokens.lengths, row) for tokens in sources]
    packed = best_fit(np.concatenate([piece.length for piece in pieces]), row)
    return int(packed.max()) + 1 if len(packed) else 0


def _borders(counts: NDArray[np.integer] | NDArray[np.floating]) -> Integers:
    """Return the running sums from 0 on, one more than there are counts."""
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
