"""From documents to batches: an endless stream that can stop and resume at any batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ziphius.config.errors import BadInput
from ziphius.data.corpus import Document
from ziphius.data.tokenizer import BOS_ID, EOS_ID, plain_text_tokenizer
from ziphius.kernels.loss import IGNORED

Progress = Callable[[int, int], None]

_ENCODE_AT_ONCE = 64


class Loader:
    """Batches of token ids for training.

    Every document becomes BOS, its tokens, EOS. An epoch is all documents one after the other, in
    an order that depends on the seed, the epoch and the documents' names alone; epochs follow one
    another without end. This stream is cut into rows of ``sequence_length + 1`` tokens that share
    their border token, so every token but the very first is a target exactly once an epoch.
    Attention crosses document borders, as in the report's pre-training (facts 6.2).

    Rows are dealt out in windows of about an epoch, each window shuffled by the seed: neighbouring
    rows are often of one document, and a batch of a single document is a poor sample of the text.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        on_progress: Progress | None = None,
    ) -> None:
        """Encode all documents now; ``on_progress`` gets (documents done, documents in all).

        Raises BadInput when there is no document.
        """
        if not documents:
            raise BadInput("data: no documents to train on: give data.source more text")
        ordered = sorted(documents, key=lambda document: (document.name, document.text))
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self._names = [document.name for document in ordered]
        self._pieces = encode(ordered, tokenizer, on_progress)
        self._rows_dealt = 0
        self._epochs: dict[int, NDArray[np.int32]] = {}
        self._order: tuple[int, list[int]] = (-1, [])
        self.tokens_per_epoch = sum(len(piece) for piece in self._pieces)
        self._rows_per_window = max(1, self.tokens_per_epoch // sequence_length)

    def next_batch(self) -> torch.Tensor:
        """Return the next ``[B, T+1]`` int64 token ids, on the CPU.

        ``[:, :-1]`` are the inputs and ``[:, 1:]`` the targets.
        """
        length = self.sequence_length
        numbers = range(self._rows_dealt, self._rows_dealt + self.batch_size)
        rows = [self.stream(self._dealt(n) * length, length + 1) for n in numbers]
        self._rows_dealt += self.batch_size
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def stream(self, start: int, count: int) -> NDArray[np.int32]:
        """Return ``count`` tokens of the endless stream that rows are cut from."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.tokens_per_epoch)
            part = self._epoch_tokens(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def state(self) -> dict[str, int]:
        """Return how many rows were dealt, and what they are rows of."""
        return {"rows_dealt": self._rows_dealt, **self._identity()}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Continue where ``state`` was taken. The batch size may differ from then.

        Raises BadInput for the state of a loader with another text, tokenizer, row length or seed.
        """
        expected = self._identity()
        if {"rows_dealt", *expected} - state.keys():
            raise BadInput("loader state: not complete: resume from another checkpoint")
        differing = [key for key, value in expected.items() if state[key] != value]
        if differing:
            raise BadInput(
                f"loader state: {', '.join(differing)} differs from this run's: resume with the "
                "text, the tokenizer, the sequence length and the seed that the run began with"
            )
        self._rows_dealt = int(state["rows_dealt"])

    def _identity(self) -> dict[str, int]:
        digest = hashlib.sha256()
        for name, piece in zip(self._names, self._pieces, strict=True):
            digest.update(_name_bytes(name) + b"\0")
            digest.update(piece.astype("<i4").tobytes())
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "tokens_per_epoch": self.tokens_per_epoch,
            "fingerprint": int.from_bytes(digest.digest()[:6], "big"),  # exact in any JSON reader
        }

    def _dealt(self, number: int) -> int:
        """Return which row of the stream is dealt as ``number``."""
        window, place = divmod(number, self._rows_per_window)
        if self._order[0] != window:
            self._order = (window, self._shuffled(window))
        return window * self._rows_per_window + self._order[1][place]

    def _shuffled(self, window: int) -> list[int]:
        def key(row: int) -> bytes:
            return hashlib.sha256(f"{self.seed}/rows/{window}/{row}".encode()).digest()

        return sorted(range(self._rows_per_window), key=key)

    def _epoch_tokens(self, epoch: int) -> NDArray[np.int32]:
        if epoch not in self._epochs:
            order = sorted(range(len(self._names)), key=lambda i: self._key(epoch, i))
            # A window of rows is hardly longer than an epoch, so older ones are not needed again.
            self._epochs = {e: t for e, t in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs[epoch] = np.concatenate([self._pieces[i] for i in order])
        return self._epochs[epoch]

    def _key(self, epoch: int, index: int) -> bytes:
        text = f"{self.seed}/{epoch}/".encode() + _name_bytes(self._names[index])
        return hashlib.sha256(text).digest()


@dataclass(frozen=True)
class HeldoutRows:
    """Held-out text as rows. All int64, on the CPU.

    ``targets_MT[m, t]`` follows ``tokens_MT[m, t]``. The last row is filled with EOS inputs whose
    targets are ``IGNORED``. ``bytes`` counts the text's UTF-8 bytes.
    """

    tokens_MT: torch.Tensor
    targets_MT: torch.Tensor
    bytes: int


def heldout_rows(
    documents: Sequence[Document], tokenizer: Tokenizer, sequence_length: int, max_bytes: int
) -> HeldoutRows:
    """Cut the documents of ``select_heldout`` into rows; every token but the first is a target.

    Each document is BOS, its tokens, EOS. Raises BadInput when there is no document.
    """
    chosen = select_heldout(documents, max_bytes)
    stream = np.concatenate(encode(chosen, tokenizer)).astype(np.int64)
    targets = len(stream) - 1
    rows = -(-targets // sequence_length)
    tokens_MT = np.full(rows * sequence_length, EOS_ID, dtype=np.int64)
    targets_MT = np.full(rows * sequence_length, IGNORED, dtype=np.int64)
    tokens_MT[:targets] = stream[:-1]
    targets_MT[:targets] = stream[1:]
    return HeldoutRows(
        torch.from_numpy(tokens_MT.reshape(rows, sequence_length)),
        torch.from_numpy(targets_MT.reshape(rows, sequence_length)),
        sum(document.size for document in chosen),
    )


def select_heldout(documents: Sequence[Document], max_bytes: int) -> tuple[Document, ...]:
    """Return the first documents by name that fit in ``max_bytes`` together, at least one.

    A first document that is longer alone is cut at a character. Baselines are to be measured on
    these same documents. Raises BadInput when there is no document.
    """
    ordered = sorted(documents, key=lambda document: (document.name, document.text))
    if not ordered:
        raise BadInput("data: no held-out documents to validate on: give data.source more text")
    chosen, total = [], 0
    for document in ordered:
        total += document.size
        if total > max_bytes:
            break
        chosen.append(document)
    if chosen:
        return tuple(chosen)
    first = ordered[0]
    beginning = first.text.encode()[:max_bytes].decode(errors="ignore") or first.text[:1]
    return (Document(first.name, beginning),)


def encode(
    documents: Sequence[Document], tokenizer: Tokenizer, on_progress: Progress | None = None
) -> list[NDArray[np.int32]]:
    """Return each document as BOS, its tokens, EOS. Control tokens in its text stay text."""
    plain = plain_text_tokenizer(tokenizer)
    pieces: list[NDArray[np.int32]] = []
    for start in range(0, len(documents), _ENCODE_AT_ONCE):
        texts = [document.text for document in documents[start : start + _ENCODE_AT_ONCE]]
        for encoding in plain.encode_batch_fast(texts, add_special_tokens=False):
            pieces.append(np.array([BOS_ID, *encoding.ids, EOS_ID], dtype=np.int32))
        if on_progress is not None:
            on_progress(len(pieces), len(documents))
    return pieces


def _name_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
