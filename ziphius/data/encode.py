"""Texts to token ids: in a stream, or a whole source in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ziphius.config.errors import BadInput
from ziphius.data.documents import Document
from ziphius.data.tokenizer import BOS_ID, EOS_ID, plain_text_tokenizer
from ziphius.data.tokens import document_keys, name_bytes

Progress = Callable[[int, int], None]

_AT_ONCE = 64


def encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[NDArray[np.int32]]:
    """Yield each document as BOS, its tokens, EOS. Special tokens in its text stay text.

    Raises BadInput for a text that is no Unicode: one with half of a surrogate pair.
    """
    plain = plain_text_tokenizer(tokenizer)
    remaining = iter(documents)
    while some := list(islice(remaining, _AT_ONCE)):
        try:
            texts = [document.text for document in some]
            encodings = plain.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            raise BadInput(_not_unicode(some)) from None
        for encoding in encodings:
            yield np.array([BOS_ID, *encoding.ids, EOS_ID], dtype=np.int32)


class EncodedDocuments:
    """A source's documents as token ids, all in memory; implements ``Tokens`` and
    ``Projects``.

    They are sorted by name, so the order in which they are given does not matter.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        on_progress: Progress | None = None,
    ) -> None:
        """Encode all documents now; ``on_progress`` gets (documents done, documents in all).

        Raises BadInput as ``encode`` does.
        """
        ordered = sorted(documents, key=lambda document: (document.name, document.text))
        pieces: list[NDArray[np.int32]] = []
        for ids in encode(ordered, tokenizer):
            pieces.append(ids)
            if on_progress is not None and len(pieces) % _AT_ONCE == 0:
                on_progress(len(pieces), len(ordered))
        if on_progress is not None:
            on_progress(len(pieces), len(ordered))
        self.lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self.keys = document_keys(document.name for document in ordered)
        self.projects = document_keys(document.project for document in ordered)
        self.fingerprint = _fingerprint(ordered, pieces)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._tokens = np.concatenate([np.empty(0, dtype=np.int32), *pieces])

    def document(self, index: int) -> NDArray[np.int32]:
        """Return the token ids of one document: a view."""
        start = self._starts[index]
        return self._tokens[start : start + self.lengths[index]]


def _fingerprint(documents: Sequence[Document], pieces: Sequence[NDArray[np.int32]]) -> int:
    digest = hashlib.sha256()
    for document, piece in zip(documents, pieces, strict=True):
        for part in (name_bytes(document.name), piece.astype("<i4").tobytes()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return int.from_bytes(digest.digest()[:6], "big")


def _not_unicode(documents: Sequence[Document]) -> str:
    for document in documents:
        try:
            document.text.encode()
        except UnicodeEncodeError as error:
            return (
                f"data: {document.name}: character {error.start} is half of a surrogate pair: "
                "no Unicode text: remove or repair it"
            )
    return "data: a text is no string"
