"""Long documents: whole files of one project, one behind the other (report section 4.3)."""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ziphius.data.tokens import Projects, Tokens


class ProjectTokens(Tokens, Projects, Protocol):
    """A source whose documents have projects."""


class LongDocuments:
    """A source's files joined into documents of at most ``longest`` tokens; implements ``Tokens``.

    A document is as many files of one project as fit, in the order of their names, so that a row
    sees what files say of one another. A file that is longer alone is a document alone. Every file
    keeps its BOS and EOS: a file still begins as all files did in pre-training, and whoever reads
    one alone later finds the same. The row numbers them as one document, so that with
    ``data.document_mask`` too files of a project see one another, and other projects don't.
    """

    def __init__(self, tokens: ProjectTokens, longest: int) -> None:
        self.tokens = tokens
        order, self._starts = _grouped(tokens.projects, tokens.lengths, longest)
        self._files = order
        sizes = np.concatenate(([0], np.cumsum(tokens.lengths[order])))
        self.lengths = np.diff(sizes[self._starts]).astype(np.int64)
        # A file is the first of one document only.
        self.keys = tokens.keys[order[self._starts[:-1]]]
        text = f"{tokens.fingerprint}/{longest}".encode()
        self.fingerprint = int.from_bytes(hashlib.sha256(text).digest()[:6], "big")

    @property
    def files(self) -> int:
        """How many files there are."""
        return len(self._files)

    def document(self, index: int) -> NDArray[np.int32]:
        """Return the token ids of one document: BOS .. EOS of each of its files."""
        if not 0 <= index < len(self.lengths):
            raise IndexError(index)
        files = self._files[self._starts[index] : self._starts[index + 1]].tolist()
        return np.concatenate([self.tokens.document(file) for file in files])


def _grouped(
    projects: NDArray[np.uint64], lengths: NDArray[np.int64], longest: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the files, project by project, and where in that order each document begins.

    There is one more start than there are documents, for the end.
    """
    _, first, which = np.unique(projects, return_index=True, return_inverse=True)
    order = np.argsort(first[which], kind="stable").astype(np.int64)
    starts, room, project = [], 0, None
    for place, file in enumerate(order.tolist()):
        size = int(lengths[file])
        if projects[file] != project or size > room:
            starts.append(place)
            room, project = longest, projects[file]
        room -= size
    return order, np.array([*starts, len(order)], dtype=np.int64)
