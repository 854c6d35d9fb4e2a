"""A text and its name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from ziphius.data.tokens import name_bytes


@dataclass(frozen=True)
class Document:
    """One text.

    ``name`` is unique in its source and never moves: a file's path inside the source, with forward
    slashes; for a record its file's path, ``#`` and the number of its line or row, from 1.
    ``source`` is the source's place in the mixture.
    """

    name: str
    text: str
    source: int = 0
    is_record: bool = False

    @property
    def package(self) -> str:
        """The top-level package the document is in, or its own module name."""
        return package_of(self.name)

    @property
    def project(self) -> str:
        """What it is packed together with in long rows: its package; a record stands alone."""
        return self.name if self.is_record else self.package

    @property
    def size(self) -> int:
        """Number of UTF-8 bytes of the text."""
        return len(self.text.encode())

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text's UTF-8 bytes."""
        return hashlib.sha256(self.text.encode()).digest()


def package_of(name: str) -> str:
    """Return the first folder of a document's name, or the name itself without its suffix."""
    path = PurePosixPath(name)
    return path.parts[0] if len(path.parts) > 1 else path.stem


def name_hash(name: str) -> int:
    """Return the SHA-256 of a name as a number."""
    return int.from_bytes(hashlib.sha256(name_bytes(name)).digest(), "big")


def digest_of_texts(texts: Iterable[tuple[int, str, bytes]]) -> str:
    """Return a hex SHA-256 over documents: (source, name, SHA-256 of the text), in any order."""
    digest = hashlib.sha256()
    for source, name, text_digest in sorted(texts):
        encoded = name_bytes(name)
        for number in (source, len(encoded)):
            digest.update(number.to_bytes(8, "little"))
        digest.update(encoded + text_digest)
    return digest.hexdigest()
