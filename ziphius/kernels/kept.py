"""What FP8 training keeps of attention's output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.kernels import e5m6


class KeptOutput:
    """The output of attention as it is kept for backward: E5M6, once for both that need it.

    Attention's own backward and the output projection's weight gradient read it (facts 4.1).
    """

    def __init__(self, width: int, version: e5m6.Version) -> None:
        """``width`` is that of a head; attention may give more columns, which are padding."""
        self.width, self.version = width, version
        self.tensors: tuple[Tensor, ...] = ()

    def keep(self, out_BHTv: Tensor) -> tuple[Tensor, ...]:
        """Encode the heads' outputs, as rows ``[B, T, H * v]``; return what is to be saved."""
        rows_BTo = out_BHTv[..., : self.width].transpose(1, 2).flatten(-2)
        self.tensors = tuple(self.version.encode(rows_BTo))
        return self.tensors

    def restore(self, tensors: tuple[Tensor, ...], like_BHTv: Tensor) -> Tensor:
        """Decode what was saved to the shape and dtype of the values."""
        heads, length, padded = like_BHTv.shape[1:]
        rows_BTo = self.rows(tensors, heads * self.width, like_BHTv.dtype)
        out_BHTv = rows_BTo.unflatten(-1, (heads, self.width)).transpose(1, 2)
        missing = (padded - self.width, length - out_BHTv.shape[2])
        return F.pad(out_BHTv, (0, missing[0], 0, missing[1])) if any(missing) else out_BHTv

    def rows(self, tensors: tuple[Tensor, ...], width: int, dtype: torch.dtype) -> Tensor:
        """Decode what was saved, as rows ``[B, T, width]``."""
        return self.version.decode(e5m6.E5M6(*tensors), width, dtype)
