"""A Hugging Face directory of a model that lies on many ranks: each writes its own files.

Of a weight that is cut the pieces travel to the rank that writes it, one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from ziphius.checkpoint.files import flush, sha256_of
from ziphius.checkpoint.huggingface import stored_as
from ziphius.checkpoint.keys import shared_copies
from ziphius.checkpoint.pieces import Kind, PieceWriter
from ziphius.checkpoint.shards import MAX_SHARD_BYTES, TORCH_METADATA, shard_files
from ziphius.config.errors import ZiphiusError
from ziphius.config.model import ModelConfig
from ziphius.parallel.collectives import Axis, Lost
from ziphius.parallel.owners import Entry, Owners, Piece


class Attempt:
    """Work of which nothing more is done once something failed, while what others wait for is.

    Nor is it once ``given_up`` is set.
    """

    def __init__(self, given_up: Event | None = None) -> None:
        self.error: Exception | None = None
        self._given_up = given_up or Event()

    def __call__(self, action: Callable[[], None]) -> None:
        """Do something, unless something before it failed. Lost is raised: nobody is to wait."""
        if self.error is not None:
            return
        try:
            require_wanted(self._given_up)
            action()
        except Lost:
            raise
        except Exception as error:  # whatever it is: the other ranks wait to be told
            self.error = error


def require_wanted(given_up: Event) -> None:
    """Raise ZiphiusError where a save has been given up."""
    if given_up.is_set():
        raise ZiphiusError("not saved: the run was stopped")


class Export:
    """Which rank writes which tensors of a checkpoint into which file: the same on all ranks.

    ``dtype`` is what weights are written in; MTP modules get the copies that the format asks for.
    """

    def __init__(
        self,
        owners: Owners,
        config: ModelConfig,
        dtype: torch.dtype,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.owners, self.dtype = owners, dtype
        self._names: dict[str, list[str]] = {name: [name] for name in owners.entries}
        for copy, original in shared_copies(config).items():
            self._names[original].append(copy)
        shards: list[list[Entry]] = []
        for writer in sorted({entry.writer for entry in owners.entries.values()}):
            shards += self._shards(writer, max_shard_bytes)
        self.tensors: dict[str, dict[str, Kind]] = {}
        self.placed: dict[str, str] = {}
        for file, shard in zip(shard_files(len(shards)), shards, strict=True):
            names = [(name, e) for e in shard for name in self._names[e.name]]
            self.tensors[file] = {name: self.kind(entry) for name, entry in names}
            self.placed |= dict.fromkeys(self.tensors[file], file)

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(kind.nbytes for file in self.tensors.values() for kind in file.values())

    def kind(self, entry: Entry) -> Kind:
        """Return how a weight is stored."""
        return Kind(stored_as(entry.name, self.dtype), entry.whole)

    def write(self, folder: Path, held: dict[str, Tensor], axis: Axis, attempt: Attempt) -> Sums:
        """Write this rank's files; all ranks do this together. Return their SHA-256.

        ``held`` are the pieces that this rank owns, on the CPU and as they are stored; it is
        emptied. What goes wrong on this rank is in ``attempt``. Raises Lost where another is gone.
        """
        out = _Out(self, folder, attempt)
        # One order on all ranks, so that nobody waits for one that waits for it.
        for entry in self.owners.entries.values():
            own = held.pop(entry.name, None)
            if entry.writer == axis.place:
                self._assemble(entry, own, out, axis)
            elif own is not None:
                axis.start_send(own, entry.writer, what=entry.name).wait()
            del own
        out.close()
        return out.sums

    def _assemble(self, entry: Entry, own: Tensor | None, out: _Out, axis: Axis) -> None:
        """Bring the pieces of a weight together, in rows if that is how they are cut."""
        if entry.dim == 0 or len(entry.pieces) == 1:
            for piece in entry.pieces:
                part = self._part(entry, piece, own, axis)
                out.put(entry, self._names[entry.name], piece.start, part)
            return
        parts = [self._part(entry, piece, own, axis) for piece in entry.pieces]
        out.put(entry, self._names[entry.name], 0, torch.cat(parts, entry.dim))

    def _part(self, entry: Entry, piece: Piece, own: Tensor | None, axis: Axis) -> Tensor:
        if piece.owner == axis.place:
            assert own is not None, "an owner has a copy"
            return own
        shape = list(entry.whole)
        shape[entry.dim] = piece.size
        part = torch.empty(shape, dtype=self.kind(entry).dtype)
        return axis.start_receive(part, piece.owner, what=entry.name).wait()

    def _shards(self, writer: int, max_shard_bytes: int) -> list[list[Entry]]:
        """Cut what a rank writes into files. A weight and its copies stay together."""
        shards: list[list[Entry]] = []
        room = 0
        for entry in self.owners.entries.values():
            if entry.writer != writer:
                continue
            size = prod(entry.whole) * self.kind(entry).dtype.itemsize
            size *= len(self._names[entry.name])
            if not shards or size > room:
                shards.append([])
                room = max_shard_bytes
            shards[-1].append(entry)
            room -= size
        return shards


Sums = dict[str, str]


class _Out:
    """The files of one rank, one open at a time."""

    def __init__(self, export: Export, folder: Path, attempt: Attempt) -> None:
        self.export, self.folder, self.attempt = export, folder, attempt
        self.sums: Sums = {}
        self._file, self._writer = "", None

    _writer: PieceWriter | None

    def put(self, entry: Entry, names: list[str], start: int, rows: Tensor) -> None:
        self.attempt(lambda: self._put(entry, names, start, rows))

    def close(self) -> None:
        self.attempt(self._finish)
        if self._writer is not None:  # something failed: the file is thrown away
            self._writer.__exit__(OSError, None, None)

    def _put(self, entry: Entry, names: list[str], start: int, rows: Tensor) -> None:
        file = self.export.placed[entry.name]
        if file != self._file:
            self._finish()
            tensors = self.export.tensors[file]
            self._writer = PieceWriter(self.folder / file, tensors, TORCH_METADATA)
            self._file = file
        assert self._writer is not None, "opened above"
        for name in names:
            self._writer.put(name, start, rows)

    def _finish(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        path = self.folder / self._file
        flush(path)
        self.sums[self._file] = sha256_of(path)
