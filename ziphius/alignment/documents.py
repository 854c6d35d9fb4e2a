"""Sums over the documents of rows, which several processes may share."""

from __future__ import annotations

from torch import Tensor

from ziphius.data.rows import NO_DOCUMENT, Batch
from ziphius.model.positions import Judged
from ziphius.model.transformer import Transformer


class DocumentSums:
    """Sums what tokens have over their document, wherever its tokens lie.

    ``documents``, int ``[B, j]``, are the documents of the positions that this process has, of
    ``width`` at most a row, and ``counted``, bool ``[j]``, those of them that it is to count; None
    stands for all. The gradient of a sum is that of the positions here.
    """

    def __init__(
        self,
        model: Transformer,
        documents_Bj: Tensor,
        width: int,
        counted_j: Tensor | None = None,
    ) -> None:
        self.model, self.width, self.counted_j = model, width, counted_j
        # Padding is no document; what it has is to be zero.
        self.documents_Bj = documents_Bj.where(documents_Bj != NO_DOCUMENT, 0).long()

    @classmethod
    def of_judged(cls, model: Transformer, judged: Judged, rows: Batch) -> DocumentSums:
        """Sum over the documents of targets, whose log-probabilities are known."""
        documents_Bj = judged.pick(rows.documents_BS[:, 1:])
        return cls(model, documents_Bj, documents_in(rows), judged.counted)

    @classmethod
    def of_inputs(cls, model: Transformer, rows: Batch) -> DocumentSums:
        """Sum over the documents of the inputs that are this process's own."""
        documents_Bt = model.positions.own(rows.documents_BS[:, :-1], 0)
        return cls(model, documents_Bt, documents_in(rows))

    def __call__(self, values_Bj: Tensor, times_Bd: Tensor | float = 1.0) -> Tensor:
        """Return every document's sum, ``[B, width]``; ``times`` multiplies its gradient."""
        here_Bd = self._here(values_Bj)
        return self._everywhere(values_Bj.detach()) + (here_Bd - here_Bd.detach()) * times_Bd

    def of_tokens(self, values_Bj: Tensor, learned_Bj: Tensor) -> Tensor:
        """Give every position its document's sum over learned tokens, ``[B, j]``.

        For losses that are sums over these. Tokens that are judged elsewhere have the same loss,
        and the same gradient in what is here: it is told as many times as there are tokens, by each
        of those that are here.
        """
        ones_Bj = learned_Bj.to(values_Bj.dtype)
        times_Bd = self._everywhere(ones_Bj) / self._here(ones_Bj).clamp(min=1)
        return self(values_Bj * learned_Bj, times_Bd).gather(1, self.documents_Bj)

    def share_here(self, values_Bj: Tensor) -> Tensor:
        """Return which share of a document's sum this process counts, ``[B, width]``.

        Shares of all processes add up to 1. For what all of them know of a document and is to be
        counted once.
        """
        everywhere_Bd = self._everywhere(values_Bj)
        here_Bd = self._here(self._counted(values_Bj))
        return here_Bd / everywhere_Bd.masked_fill(everywhere_Bd == 0, 1)

    def _everywhere(self, values_Bj: Tensor) -> Tensor:
        return self.model.positions.sum(self._here(self._counted(values_Bj)))

    def _counted(self, values_Bj: Tensor) -> Tensor:
        return values_Bj if self.counted_j is None else values_Bj * self.counted_j

    def _here(self, values_Bj: Tensor) -> Tensor:
        zero_Bd = values_Bj.new_zeros(len(values_Bj), self.width)
        return zero_Bd.scatter_add(1, self.documents_Bj, values_Bj)


def documents_in(rows: Batch) -> int:
    """Return how many documents the row with most of them has, rounded up to whole pairs."""
    number = max(1, int(rows.documents_BS.max()) + 1)
    return number + number % 2
