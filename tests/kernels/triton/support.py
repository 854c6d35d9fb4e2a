"""Comparisons that the tests of Triton's kernels share."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ziphius.kernels.quantize import Fp8

ON_GPU = torch.cuda.is_available()
T = TypeVar("T", Tensor, None)


def on_cpu(x: T) -> T:
    """Where the references compute: their bits do not depend on a GPU's arithmetic."""
    return None if x is None else x.cpu()


def assert_same(result: Fp8, expected: Fp8) -> None:
    """Every code and scale is equal; of a NaN only that it is one."""
    assert result.codes.dtype == expected.codes.dtype
    assert result.rows == expected.rows
    assert result.codes.is_contiguous()
    assert torch.equal(_codes(result.codes), _codes(expected.codes))
    torch.testing.assert_close(result.scales.cpu(), expected.scales, rtol=0, atol=0, equal_nan=True)


def _codes(codes: Tensor) -> Tensor:
    codes = codes.cpu().view(torch.uint8)
    return codes.masked_fill(codes & 0x7F == 0x7F, 0x7F)
