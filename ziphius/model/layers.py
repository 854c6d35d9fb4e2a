"""The three layers that everything else is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ziphius.kernels.select import Kernels
from ziphius.model.precision import Kind, Precision

Device = torch.device | str | None


class Linear(nn.Module):
    """``y = x W^T`` without a bias, ``W`` stored ``[out, in]``: the precision seam.

    ``kind`` picks the row of the precision table. The product runs in that dtype and the result
    keeps it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        precision: Precision,
        kernels: Kernels,
        device: Device,
        kind: Kind = "linear",
    ) -> None:
        super().__init__()
        self.dtype = precision.dtype(kind)
        self.linear = kernels.function("linear")
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=precision.storage, device=device)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x, self.weight, self.dtype)
        return y


class RMSNorm(nn.Module):
    """``g * x / sqrt(mean(x^2) + eps)`` in at least FP32, cast back (facts 1.2)."""

    def __init__(
        self, width: int, eps: float, precision: Precision, kernels: Kernels, device: Device
    ) -> None:
        super().__init__()
        self.eps = eps
        self.rms_norm = kernels.function("norm")
        self.weight = nn.Parameter(torch.empty(width, dtype=precision.storage, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rms_norm(x, self.weight, self.eps)
        return y


class Embedding(nn.Module):
    """Rows of a ``[V, D]`` table by token id, in the dtype of the residual stream."""

    def __init__(self, vocab_size: int, width: int, precision: Precision, device: Device) -> None:
        super().__init__()
        self.dtype = precision.dtype("embedding")
        self.weight = nn.Parameter(
            torch.empty(vocab_size, width, dtype=precision.storage, device=device)
        )

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight).to(self.dtype)
