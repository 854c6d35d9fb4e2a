"""Rows of several documents, and what each position of a row is to predict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ziphius.data.tokenizer import BOS_ID
from ziphius.kernels.loss import IGNORED

NO_DOCUMENT = -1
LEARNED, EXPERTS = "learned", "experts"


@dataclass(frozen=True)
class Batch:
    """Rows of ``S = T + 1`` tokens: ``[:, :-1]`` are the inputs.

    ``tokens``: int64 ``[B, S]``, PAD where a row is empty. ``documents``: int32 ``[B, S]``, the
    number of the document within its row, counted from 0, and -1 where the row is empty.
    ``fields`` are what else is known of every token, ``[B, S, ..]``. Where there is ``LEARNED``,
    bool ``[B, S]``, other tokens are no targets. ``EXPERTS``, ``[B, S, layers, K]``, are those that
    the main layers that route are to take.
    """

    tokens_BS: Tensor
    documents_BS: Tensor
    fields: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.tokens_BS.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        fields = {name: values.to(device) for name, values in self.fields.items()}
        return Batch(self.tokens_BS.to(device), self.documents_BS.to(device), fields)

    def rows(self, chosen: slice) -> Batch:
        """Return some of the rows."""
        fields = {name: values[chosen] for name, values in self.fields.items()}
        return Batch(self.tokens_BS[chosen], self.documents_BS[chosen], fields)

    def split(self, size: int) -> Iterator[Batch]:
        """Yield micro-batches of ``size`` rows, the last one with what is left."""
        return (self.rows(slice(first, first + size)) for first in range(0, len(self), size))


def row_targets(batch: Batch, depth: int, *, document_mask: bool) -> Tensor:
    """Return the targets of prediction depth ``depth``, int64 ``[B, T - depth]`` (facts 3.1).

    Depth 0 is the main loss, depth k the k-th MTP module. Position i predicts token
    ``i + depth + 1``; its target is ``IGNORED`` where there is nothing to learn:

    - the token is padding, or is not to be learned;
    - with ``document_mask`` it is of another document than position i;
    - it is the first token in the row of a document that began in an earlier row. That token was
      the last one there, and a target, as ``pack.cut`` shares border tokens.

    So without the mask the BOS of every document but a row's first is a target, as in the report's
    pre-training, and with it no BOS is.
    """
    tokens_Bt = batch.tokens_BS[:, depth + 1 :]
    documents_Bt = batch.documents_BS[:, depth + 1 :]
    ignored_Bt = documents_Bt == NO_DOCUMENT
    if LEARNED in batch.fields:
        ignored_Bt |= ~batch.fields[LEARNED][:, depth + 1 :]
    if document_mask:
        ignored_Bt |= documents_Bt != batch.documents_BS[:, : documents_Bt.shape[1]]
    else:
        first_Bt = documents_Bt != batch.documents_BS[:, depth:-1]
        ignored_Bt |= first_Bt & (tokens_Bt != BOS_ID)
    return tokens_Bt.masked_fill(ignored_Bt, IGNORED)
