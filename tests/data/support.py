"""What the tests of packing and loading share: sources whose every token is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ziphius.data.documents import Document
from ziphius.data.tokenizer import BOS_ID, train_tokenizer
from ziphius.data.tokens import document_keys

FIRST_ID = 1000

DOCUMENTS = [
    Document(f"package{i}/module.py", f"document {i}:\n" + "whale dives deep, " * (i % 5) + "(x)\n")
    for i in range(12)
]
TOKENIZER = train_tokenizer([document.text * 2 for document in DOCUMENTS], 330)


@dataclass
class Numbered:
    """Documents whose tokens are all different: BOS, then numbers that no other token has."""

    sizes: Sequence[int]
    first: int = FIRST_ID
    name: str = "n"
    asked: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lengths = np.array(self.sizes, dtype=np.int64)
        self.keys = document_keys(f"{self.name}{i}" for i in range(len(self.sizes)))
        self.fingerprint = hash((tuple(self.sizes), self.first, self.name)) % 2**48
        self.begins = self.first + np.cumsum(self.lengths - 1) - (self.lengths - 1)

    def document(self, index: int) -> NDArray[np.int32]:
        self.asked.append(index)
        start, count = self.begins[index], self.lengths[index] - 1
        return np.concatenate(([BOS_ID], np.arange(start, start + count))).astype(np.int32)

    def all_tokens(self) -> list[int]:
        """Return every token but the BOS of each document."""
        return [int(t) for i in range(len(self.sizes)) for t in self.document(i)[1:]]
