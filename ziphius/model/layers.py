"""The three layers that everything else is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ziphius.kernels.fp8 import Fp8Weight, Operand, Tiled
from ziphius.kernels.kept import KeptOutput
from ziphius.kernels.select import Kernels
from ziphius.kernels.stored import Codes
from ziphius.model.derived import Derived
from ziphius.model.precision import Kind, Precision

Device = torch.device | str | None


class Linear(nn.Module):
    """``y = x W^T`` without a bias, ``W`` stored ``[out, in]``: the precision seam.

    ``kind`` picks the row of the precision table. The product runs in that dtype and the result
    keeps it; one in FP8 gives what the table calls compute.
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
        self.fp8 = kernels.fp8(precision.power_of_two) if precision.in_fp8(kind) else None
        self.derived = Derived()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=precision.storage, device=device)
        )

    def forward(self, x: Operand, kept: KeptOutput | None = None) -> Tensor:
        """Multiply ``[..., in]`` to ``[..., out]``; ``kept`` holds ``x`` for backward already."""
        if self.fp8 is not None:
            return self.fp8.linear(self.fp8.operand(x), self.weight, self.in_fp8(), kept)
        # A checkpoint in FP8 may hold some layers otherwise.
        value = x.value if isinstance(x, Tiled) else x
        y: Tensor = self.linear(value, self.weight, self.dtype)
        return y

    def in_fp8(self) -> Fp8Weight:
        """Return the weight as FP8 products take it: as stored, or quantised once a version."""
        assert self.fp8 is not None, "asked for by products in FP8"
        if isinstance(self.weight, Codes):  # a checkpoint's own, which only answers
            return Fp8Weight(self.weight.blocks, None)
        form: Fp8Weight = self.derived.get("fp8", self.weight, self.fp8.weight)
        return form


class RMSNorm(nn.Module):
    """``g * x / sqrt(mean(x^2) + eps)`` in at least FP32, cast back (facts 1.2)."""

    def __init__(
        self, width: int, eps: float, precision: Precision, kernels: Kernels, device: Device
    ) -> None:
        super().__init__()
        self.eps = eps
        self.rms_norm = kernels.function("norm")
        self.norm_tiles = kernels.function("norm_tiles") or self._in_two_steps
        self.fp8 = kernels.fp8(precision.power_of_two) if precision.in_fp8("linear") else None
        self.weight = nn.Parameter(torch.empty(width, dtype=precision.storage, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rms_norm(x, self.weight, self.eps)
        return y

    def operand(self, x: Tensor, *, dispatched: bool = False) -> Operand:
        """Norm what linear layers take: in FP8 tiles, where those multiply in FP8.

        Rows that are ``dispatched`` have powers of two as scales (facts 4.1).
        """
        if self.fp8 is None:
            y: Tensor = self(x)
            return y
        return self.tiled(x, dispatched or self.fp8.power_of_two)

    def tiled(self, x: Tensor, power_of_two: bool) -> Tiled:
        """Norm and quantise."""
        return Tiled(*self.norm_tiles(x, self.weight, self.eps, power_of_two))

    def _in_two_steps(self, x: Tensor, weight: Tensor, eps: float, power_of_two: bool) -> Tiled:
        assert self.fp8 is not None, "asked for by products in FP8"
        value: Tensor = self.rms_norm(x, weight, eps)
        return self.fp8.operand(value, power_of_two=power_of_two)


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
