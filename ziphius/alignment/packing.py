"""Samples into rows that they share without seeing one another (report 5.1), epoch after epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ziphius.alignment.records import Sample
from ziphius.config.errors import BadInput
from ziphius.data.heldout import HeldoutRows
from ziphius.data.pack import best_fit
from ziphius.data.randomness import draw
from ziphius.data.rows import LEARNED, NO_DOCUMENT, Batch, row_targets
from ziphius.data.tokenizer import EOS_ID, PAD_ID, token_bytes
from ziphius.kernels.loss import IGNORED

# Samples that stay side by side in one row.
Unit = Sequence[Sample]
# Lays samples out in rows of so many tokens.
Lay = Callable[[Sequence[Sequence[Sample]], int], Batch]
# Rows of an epoch: the places of the units in each.
Rows = list[NDArray[np.int64]]


class PackedUnits:
    """Batches of packed rows; the order of an epoch depends on the seed and its number alone.

    Rows hold ``sequence_length + 1`` tokens, of which ``spare`` ones stay empty. Every epoch has
    every unit once, packed anew, and as many rows as every other. ``lay`` makes a batch of rows.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        *,
        sequence_length: int,
        seed: int,
        spare: int = 0,
        lay: Lay | None = None,
    ) -> None:
        """Raises BadInput where there is no sample."""
        if not units:
            raise BadInput("no sample to train on: give records with words of the assistant")
        self._units, self._row, self._seed = units, sequence_length + 1, seed
        self._room, self._lay = self._row - spare, lay or as_rows
        self._lengths = _lengths(units)
        self._identity = _identity(units, sequence_length, seed)
        self._epoch, self._place = 0, 0
        self._rows = self._packed(0)

    @property
    def rows_per_epoch(self) -> int:
        """How many rows an epoch has."""
        return len(self._rows)

    @property
    def padding(self) -> float:
        """The share of places in rows that hold no token."""
        return 1 - int(self._lengths.sum()) / (len(self._rows) * self._row)

    def next_batch(self, batch_size: int) -> Batch:
        """Return the next rows; a batch goes on into the next epoch."""
        chosen: Rows = []
        while len(chosen) < batch_size:
            if self._place == len(self._rows):
                self._epoch, self._place = self._epoch + 1, 0
                self._rows = self._packed(self._epoch)
            end = min(len(self._rows), self._place + batch_size - len(chosen))
            chosen += self._rows[self._place : end]
            self._place = end
        return self._lay([[s for n in row for s in self._units[n]] for row in chosen], self._row)

    def state(self) -> dict[str, Any]:
        """Return where the next batch begins."""
        return {"epoch": self._epoch, "place": self._place, "identity": self._identity}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on there. Raises BadInput for the state of other samples, rows or seed."""
        if state.get("identity") != self._identity:
            raise BadInput(
                "the samples differ from this run's: resume with the records, tokenizer, format, "
                "sequence length and seed that it began with"
            )
        self._epoch, self._place = int(state["epoch"]), int(state["place"])
        self._rows = self._packed(self._epoch)

    @property
    def at_rest(self) -> bool:
        """The stream can stop behind any batch."""
        return True

    @property
    def turn(self) -> int:
        """All of the stream is one text."""
        return 0

    def forget(self) -> None:
        """Nothing depends on weights."""

    def close(self) -> None:
        """Nothing works ahead."""

    def _packed(self, epoch: int) -> Rows:
        """Pack an epoch's samples: in another order, equal lengths meet others."""
        order = np.argsort(draw("samples", self._seed, epoch, np.arange(len(self._units))))
        row_of = best_fit(self._lengths[order], self._room)
        by_row = np.argsort(row_of, kind="stable")
        rows = np.split(order[by_row], np.flatnonzero(np.diff(row_of[by_row])) + 1)
        shuffled = np.argsort(draw("rows", self._seed, epoch, np.arange(len(rows))))
        return [rows[n] for n in shuffled]


class PackedSamples(PackedUnits):
    """Batches of packed rows of samples that are independent of one another."""

    def __init__(self, samples: Sequence[Sample], *, sequence_length: int, seed: int) -> None:
        """Raises BadInput where there is no sample."""
        units = [(sample,) for sample in samples]
        super().__init__(units, sequence_length=sequence_length, seed=seed)


def packed_rows(units: Sequence[Unit], room: int) -> list[list[Sample]]:
    """Pack units into rows of ``room`` tokens, in one order."""
    row_of = best_fit(_lengths(units), room)
    rows: list[list[Sample]] = [[] for _ in range(int(row_of.max()) + 1)]
    for unit, row in zip(units, row_of, strict=True):
        rows[row] += unit
    return rows


def as_rows(rows: Sequence[Sequence[Sample]], length: int) -> Batch:
    """Return rows of ``length`` tokens with samples behind one another, each a document."""
    shape = (len(rows), length)
    tokens_BS, learned_BS = np.full(shape, PAD_ID, np.int64), np.zeros(shape, np.bool_)
    documents_BS = np.full(shape, NO_DOCUMENT, np.int32)
    for place, row in enumerate(rows):
        end = 0
        for number, sample in enumerate(row):
            where = slice(end, end := end + len(sample))
            tokens_BS[place, where], learned_BS[place, where] = sample.tokens, sample.learned
            documents_BS[place, where] = number
    fields = {LEARNED: torch.from_numpy(learned_BS)}
    return Batch(torch.from_numpy(tokens_BS), torch.from_numpy(documents_BS), fields)


def held_out(samples: Sequence[Sample], tokenizer: Tokenizer, length: int) -> HeldoutRows:
    """Pack samples for validation; what is measured is what the assistant wrote."""
    batch = as_rows(packed_rows([(sample,) for sample in samples], length + 1), length + 1)
    targets_MT = row_targets(batch, 0, document_mask=True)
    spelled = targets_MT[targets_MT != IGNORED].numpy()
    size = int(np.take(token_bytes(tokenizer), spelled).sum())
    tokens_MT = batch.tokens_BS[:, :-1].masked_fill(batch.documents_BS[:, :-1] < 0, EOS_ID)
    return HeldoutRows(tokens_MT, targets_MT, max(1, size), batch.documents_BS)


def _lengths(units: Sequence[Unit]) -> NDArray[np.int64]:
    return np.array([sum(map(len, unit)) for unit in units], np.int64)


def _identity(units: Sequence[Unit], sequence_length: int, seed: int) -> str:
    digest = hashlib.sha256(f"{sequence_length}/{seed}".encode())
    for sample in (sample for unit in units for sample in unit):
        digest.update(hashlib.sha256(sample.content()).digest())
    return digest.hexdigest()
