"""Documents as token ids on the disk: plain ``.npy`` files, written once, then memory-mapped.

A source's folder has ``tokens-NNNNN.npy``, its documents one after the other, none in two files;
``lengths.npy``, the tokens of every document; ``keys.npy``, the documents' identities; and
``projects.npy``, those of their projects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ziphius.config.errors import BadInput
from ziphius.data.tokens import document_keys, name_bytes

SHARD_TOKENS = 2**28
LENGTHS_FILE, KEYS_FILE, PROJECTS_FILE = "lengths.npy", "keys.npy", "projects.npy"


@dataclass(frozen=True)
class Shard:
    """A file of tokens in a source's folder."""

    file: str
    documents: int
    tokens: int


class ShardWriter:
    """Writes a source's documents into a new folder, in the order of their names.

    Leaving its ``with`` block without an error completes the files.
    """

    def __init__(self, folder: Path, dtype: str, shard_tokens: int = SHARD_TOKENS) -> None:
        """``dtype`` is ``<u2`` or ``<u4``; a file ends after the first ``shard_tokens``."""
        folder.mkdir(parents=True)
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.shards: list[Shard] = []
        self._names: list[str] = []
        self._projects: list[str] = []
        self._lengths: list[int] = []
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._documents = self._tokens = 0

    def append(self, name: str, ids: NDArray[np.int32], project: str | None = None) -> None:
        """Write one document: BOS, its tokens, EOS. By default its project is itself."""
        # The same digest as that of documents in memory: a run may go on with either.
        for part in (name_bytes(name), ids.astype("<i4").tobytes()):
            self._digest.update(len(part).to_bytes(8, "little"))
            self._digest.update(part)
        self._names.append(name)
        self._projects.append(name if project is None else project)
        self._lengths.append(len(ids))
        if self._file is None:
            self._file = open(self.folder / self._next_name(), "xb")  # noqa: SIM115
            self._write_header(self._file, 0)
        self._file.write(ids.astype(self.dtype).tobytes())
        self._documents += 1
        self._tokens += len(ids)
        if self._tokens >= self.shard_tokens:
            self._end_shard()

    @property
    def fingerprint(self) -> int:
        """48 bits over names and tokens."""
        return int.from_bytes(self._digest.digest()[:6], "big")

    @property
    def tokens(self) -> int:
        """Tokens of all documents, BOS and EOS included."""
        return sum(self._lengths)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            if self._file is not None:
                self._file.close()
            return
        self._end_shard()
        lengths = np.array(self._lengths, dtype="<i8")
        np.save(self.folder / LENGTHS_FILE, lengths, allow_pickle=False)
        for file, names in ((KEYS_FILE, self._names), (PROJECTS_FILE, self._projects)):
            keys = document_keys(names).astype("<u8")
            np.save(self.folder / file, keys, allow_pickle=False)

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        self._write_header(self._file, self._tokens)
        self._file.close()
        self.shards.append(Shard(self._next_name(), self._documents, self._tokens))
        self._file = None
        self._documents = self._tokens = 0

    def _next_name(self) -> str:
        return f"tokens-{len(self.shards):05d}.npy"

    def _write_header(self, file: BinaryIO, count: int) -> None:
        """Write a header, whose size does not depend on the count: numpy leaves room in it."""
        header = {"descr": self.dtype, "fortran_order": False, "shape": (count,)}
        npy.write_array_header_1_0(file, header)


class TokenShards:
    """A source's documents, memory-mapped; implements ``Tokens`` and ``Projects``."""

    def __init__(self, folder: Path, shards: Sequence[Shard], fingerprint: int) -> None:
        """Open the files. Raises BadInput for one that is missing or no such array."""
        self.fingerprint, self._folder = fingerprint, folder
        self.lengths = np.array(_open(folder / LENGTHS_FILE, "<i8"), dtype=np.int64)
        self.keys = np.array(_open(folder / KEYS_FILE, "<u8"), dtype=np.uint64)
        self._shards = [_open(folder / shard.file, "<u2", "<u4") for shard in shards]
        self._first = np.cumsum([0, *(shard.documents for shard in shards)])
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        counts = (len(self.lengths), len(self.keys), int(self._first[-1]))
        if len(set(counts)) > 1 or any(
            len(array) != shard.tokens or self._tokens_of(number) != shard.tokens
            for number, (array, shard) in enumerate(zip(self._shards, shards, strict=True))
        ):
            raise BadInput(f"{folder}: its files do not belong together: prepare the text again")

    @property
    def projects(self) -> NDArray[np.uint64]:
        """A number of every document's project. Raises BadInput for files of earlier versions."""
        found = np.array(_open(self._folder / PROJECTS_FILE, "<u8"), dtype=np.uint64)
        if len(found) != len(self.keys):
            raise BadInput(f"{self._folder / PROJECTS_FILE}: is of other text: prepare it again")
        return found

    def document(self, index: int) -> NDArray[np.int32]:
        """Return the token ids of one document."""
        if not 0 <= index < len(self.lengths):
            raise IndexError(index)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        start = int(self._starts[index] - self._starts[self._first[shard]])
        return self._shards[shard][start : start + int(self.lengths[index])].astype(np.int32)

    def _tokens_of(self, shard: int) -> int:
        first, last = self._first[shard], self._first[shard + 1]
        return int(self._starts[last] - self._starts[first])


def _open(path: Path, *dtypes: str) -> NDArray[np.generic]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "is damaged"
        raise BadInput(f"{path}: {reason}: prepare the text again, or copy it again") from None
    if array.ndim != 1 or array.dtype not in [np.dtype(dtype) for dtype in dtypes]:
        raise BadInput(f"{path}: is no list of {' or '.join(dtypes)}: prepare the text again")
    return array
