"""From documents to batches: an endless stream that can stop and resume at any batch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer

from ziphius.config.errors import BadInput
from ziphius.data.ahead import Ahead
from ziphius.data.rows import Batch
from ziphius.data.tokens import Tokens
from ziphius.data.windows import WindowMaker, rows_per_epoch

WINDOW_TOKENS = 2**24
# Rows are shuffled within a window; in fewer than these, neighbours would be too much alike.
_FEWEST_ROWS = 64


class Loader:
    """Batches for training from a mixture of sources.

    Every source is an endless stream of its documents, epoch after epoch, each epoch in an order
    that depends on the seed, the epoch and the documents' names alone. The streams are cut into
    windows; a window has from every source tokens in proportion to the source's weight. Some
    documents are rearranged (``fim``), some tokens are split (``token_split``), and all are packed
    into rows of ``sequence_length + 1`` tokens (``pack``), which are dealt out shuffled. Attention
    crosses document borders, as in the report's pre-training (facts 6.2), unless the caller masks.

    A window is ``window_tokens`` long, though at least 64 rows, or as long as all sources together
    if they are shorter. So the windows of a single small source are its epochs.

    Over a source's epoch every token of every document, as transformed, is a target of
    ``row_targets`` at depth 0 exactly once, except BOS: once unless it begins a row; with a
    document mask never.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Tokens, float]],
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        seed: int,
        fim_rate: float = 0.0,
        token_split_rate: float = 0.0,
        workers: int = 1,
        window_tokens: int = WINDOW_TOKENS,
        table: str = "pretrain",
    ) -> None:
        """Take sources with their weights. Nothing is read of them yet but lengths and keys.

        ``workers`` threads make as many windows ahead, and these are held in memory; with 0 they
        are made when they are needed, by the caller. The batches are the same. Close the loader,
        or drop it, to end the threads. ``table`` is the recipe's that rows are set by.

        Raises BadInput when a source is empty, when all are together shorter than a row, and
        for a ``fim_rate`` with a tokenizer that lacks the tokens.
        """
        self.sequence_length, self._table = sequence_length, table
        self._sources = tuple(tokens for tokens, _ in sources)
        counts = [int(np.sum(tokens.lengths, dtype=np.int64)) for tokens in self._sources]
        self.tokens_per_epoch = sum(counts)
        _require_text(counts, [weight for _, weight in sources], sequence_length, table)
        window = max(window_tokens, _FEWEST_ROWS * (sequence_length + 1))
        self._identity = {
            "seed": seed,
            "sequence_length": sequence_length,
            "window_tokens": window_tokens,
            "text": _digest([tokens.fingerprint for tokens in self._sources]),
            "weights": _digest([float(weight) for _, weight in sources]),
            "tokenizer": _digest(sorted(tokenizer.get_vocab(with_added_tokens=True).items())),
            "fim_rate": _digest(float(fim_rate)),
            "token_split_rate": _digest(float(token_split_rate)),
        }
        maker = WindowMaker(
            sources,
            tokenizer,
            sequence_length=sequence_length,
            seed=seed,
            fim_rate=fim_rate,
            token_split_rate=token_split_rate,
            window_tokens=min(window, self.tokens_per_epoch),
        )
        self._windows = Ahead(maker.make, workers)
        self._window, self._row = 0, 0

    def next_batch(self, batch_size: int) -> Batch:
        """Return the next ``batch_size`` rows, on the CPU; the size may change between calls.

        Raises BadInput for more rows than an epoch has, and whatever kept a window from being
        made; the loader is then where it was.
        """
        self.require_rows(batch_size)
        shape = (batch_size, self.sequence_length + 1)
        tokens_BS, documents_BS = np.empty(shape, np.int64), np.empty(shape, np.int32)
        number, row, done = self._window, self._row, 0
        while done < batch_size:
            window = self._windows.get(number)
            if row > window.rows:
                raise BadInput(
                    f"loader state: row {row} of window {number}, which has {window.rows}: "
                    "resume from another checkpoint"
                )
            some = slice(done, done + min(batch_size - done, window.rows - row))
            window.fill(row, tokens_BS[some], documents_BS[some])
            row, done = row + some.stop - done, some.stop
            if row == window.rows:
                number, row = number + 1, 0
        self._window, self._row = number, row
        return Batch(torch.from_numpy(tokens_BS), torch.from_numpy(documents_BS))

    @property
    def padding(self) -> float:
        """The share of padding in the window that is dealt out now."""
        return self._windows.get(self._window).padding

    def state(self) -> dict[str, int]:
        """Return where in the stream the next batch begins, and what it is a stream of."""
        return {"window": self._window, "row": self._row, **self._identity}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Continue where ``state`` was taken, with the same batches if their sizes are the same.

        Raises BadInput, and changes nothing, for the state of a loader with another text, mixture,
        tokenizer, row length, seed or rate; ``workers`` may differ.
        """
        if {"window", "row", *self._identity} - state.keys():
            raise BadInput("loader state: not complete: resume from another checkpoint")
        differing = [key for key, value in self._identity.items() if state[key] != value]
        if differing:
            raise BadInput(
                f"loader state: {', '.join(differing)} differs from this run's: resume with the "
                "text, mixture, tokenizer, sequence length, seed and rates the run began with"
            )
        window, row = int(state["window"]), int(state["row"])
        if window < 0 or row < 0:
            raise BadInput(
                f"loader state: window {window}, row {row}: resume from another checkpoint"
            )
        self._window, self._row = window, row

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
        """End the threads. What is asked for afterwards is made by the caller."""
        self._windows.close()

    def require_rows(self, batch_size: int) -> None:
        """Raise BadInput when an epoch has fewer rows than a batch."""
        row = self.sequence_length + 1
        if batch_size * row <= self.tokens_per_epoch:
            return
        rows = rows_per_epoch(self._sources, row)  # more than tokens / row, for there is padding
        if batch_size > rows:
            raise BadInput(
                f"data.source: {self.tokens_per_epoch:,} tokens make {rows} rows of "
                f"{_row_setting(self._table, self.sequence_length)}, a batch of "
                f"{_batch_setting(self._table, batch_size)} needs more: give more text, or lower "
                "one of the two"
            )


def _row_setting(table: str, length: int) -> str:
    plural = table == "extend"  # it has several phases
    return f"{table}.lengths: {length}" if plural else f"{table}.sequence_length = {length}"


def _batch_setting(table: str, size: int) -> str:
    return f"extend.batch_sizes: {size}" if table == "extend" else f"{table}.batch_size = {size}"


def _require_text(
    counts: Sequence[int], weights: Sequence[float], sequence_length: int, table: str
) -> None:
    if not sum(counts):
        raise BadInput("data.source: no documents to train on: give more text")
    for number, (count, weight) in enumerate(zip(counts, weights, strict=True), start=1):
        if not count:
            raise BadInput(f"data.sources: source {number} has no documents: remove it")
        if not 0 < weight < math.inf:
            raise BadInput(f"data.sources: source {number}: weight {weight}: give a positive one")
    if sum(counts) <= sequence_length:
        raise BadInput(
            f"data.source: {sum(counts)} tokens are fewer than one row of "
            f"{_row_setting(table, sequence_length)}: give more text or lower it"
        )


def _digest(value: object) -> int:
    """Return 48 bits of a hash of numbers and strings: exact in any JSON reader."""
    return int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:6], "big")
