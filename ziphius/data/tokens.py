"""Documents as token ids: what the loader reads, in memory or on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Tokens(Protocol):
    """A source's documents in a fixed order. Each is BOS, its tokens, EOS."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every document, BOS and EOS included."""
        ...

    @property
    def keys(self) -> NDArray[np.uint64]:
        """The first eight bytes of the SHA-256 of every document's name: its identity."""
        ...

    @property
    def fingerprint(self) -> int:
        """48 bits that differ when any name or token differs: exact in any JSON reader."""
        ...

    def document(self, index: int) -> NDArray[np.int32]:
        """Return the token ids of one document."""
        ...


class Projects(Protocol):
    """A source that also knows which project every document is of."""

    @property
    def projects(self) -> NDArray[np.uint64]:
        """A number of every document's project: the key of its name."""
        ...


def document_keys(names: Iterable[str]) -> NDArray[np.uint64]:
    """Return the keys of documents with these names, read as big-endian numbers."""
    digests = (hashlib.sha256(name_bytes(name)).digest()[:8] for name in names)
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def name_bytes(name: str) -> bytes:
    """Encode a path as the file system gave it, which may not be UTF-8."""
    return name.encode("utf-8", "surrogateescape")
