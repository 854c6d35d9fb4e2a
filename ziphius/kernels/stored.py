"""A weight as a checkpoint stores it: numbers, or codes with scales, read in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from ziphius.kernels.quantize import E4M3, Fp8

# The numbers of the formats in kernels/cpu/dot.h.
PLAIN: Mapping[torch.dtype, int] = MappingProxyType(
    {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2}
)
CODED: Mapping[str, int] = MappingProxyType({"fp8": 3, "int8": 4, "int4": 5})
WORDS = 7  # of a description


@dataclass(frozen=True)
class Codes:
    """A matrix ``[O, I]`` of codes, a row after the other, with FP32 scales.

    ``data`` is uint8 ``[O, I]``, or ``[O, I / 2]`` for ``int4``: bytes that are 128 above their
    value, E4M3, or nibbles that are 8 above it, the even column in the low one. A scale counts for
    ``scale_rows`` rows and ``group`` columns, a multiple of 32: ``scales`` is
    ``[ceil(O / scale_rows), ceil(I / group)]``. A weight is ``bf16(code * scale)``.
    """

    data: Tensor
    scales: Tensor
    form: str
    group: int
    scale_rows: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)`` of the matrix that is meant."""
        rows, columns = self.data.shape
        return rows, columns * 2 if self.form == "int4" else columns

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight that is meant."""
        return torch.bfloat16

    @property
    def blocks(self) -> Fp8:
        """The codes of ``fp8`` as its products take them: in blocks."""
        return Fp8(self.data.view(E4M3), self.scales, self.scale_rows)

    def to(self, device: torch.device) -> Codes:
        """Return the same on a device."""
        return replace(self, data=self.data.to(device), scales=self.scales.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.data.nbytes + self.scales.nbytes

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix: values rounded to BF16, as ``dtype``."""
        rows, columns = self.shape
        if self.form == "fp8":
            values = self.data.view(torch.float8_e4m3fn).float()
        elif self.form == "int8":
            values = self.data.float() - 128
        else:
            nibbles = torch.stack((self.data & 15, self.data >> 4), dim=-1).flatten(1)
            values = nibbles.float() - 8
        scales = self.scales.repeat_interleave(self.scale_rows, 0)[:rows]
        scales = scales.repeat_interleave(self.group, 1)[:, :columns]
        return (values * scales).bfloat16().to(dtype)


Weight = Tensor | Codes


def describe(weight: Weight) -> tuple[int, ...]:
    """Return what the compiled products need to know of a weight, ``WORDS`` numbers.

    The memory must stay where it is as long as they are used. Raises ValueError for numbers that
    are not side by side.
    """
    if isinstance(weight, Codes):
        data, scales = weight.data, weight.scales
        group, scale_rows = weight.group, weight.scale_rows
        if not (data.is_contiguous() and scales.is_contiguous() and group % 32 == 0):
            raise ValueError("codes and scales lie side by side, groups are multiples of 32")
        where = (data.data_ptr(), scales.data_ptr(), CODED[weight.form])
        return (*where, *weight.shape, group, scale_rows)
    if not weight.is_contiguous():
        raise ValueError("the numbers of a weight lie side by side")
    rows, columns = weight.shape
    return (weight.data_ptr(), 0, PLAIN[weight.dtype], rows, columns, columns, 1)
