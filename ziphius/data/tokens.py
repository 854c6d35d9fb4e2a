"""Documents as token ids: what the loader reads, in memory or on the disk."""

from __future__ import annotations

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
