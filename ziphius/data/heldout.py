"""Held-out text: which documents, and their rows. It is never rearranged, split or shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from ziphius.config.errors import BadInput
from ziphius.data.documents import Document
from ziphius.data.encode import encode
from ziphius.data.tokenizer import EOS_ID
from ziphius.kernels.loss import IGNORED


@dataclass(frozen=True)
class HeldoutRows:
    """Held-out text as rows. All int64, on the CPU.

    ``targets_MT[m, t]`` follows ``tokens_MT[m, t]``. The last row is filled with EOS inputs whose
    targets are ``IGNORED``. ``bytes`` counts the UTF-8 bytes of what the targets spell. Where there
    are ``masked`` documents, int32 ``[M, T + 1]`` as in ``Batch``, no token attends outside its
    own.
    """

    tokens_MT: torch.Tensor
    targets_MT: torch.Tensor
    bytes: int
    masked_MS: torch.Tensor | None = None


def heldout_rows(
    documents: Sequence[Document], tokenizer: Tokenizer, sequence_length: int, max_bytes: int
) -> HeldoutRows:
    """Cut the documents of ``select_heldout`` into rows; every token but the first is a target.

    Each document is BOS, its tokens, EOS. Raises BadInput when there is no document.
    """
    chosen = select_heldout(documents, max_bytes)
    stream = np.concatenate(list(encode(chosen, tokenizer))).astype(np.int64)
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
