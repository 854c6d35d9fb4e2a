"""Comparisons that the tests of Triton's kernels share."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ziphius.kernels.quantize import Fp8

ON_GPU = torch.cuda.is_available()
# For tests of hypothesis, which take no fixtures.
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
STORAGE = torch.bfloat16 if ON_GPU else torch.float32
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
    torch.testing.assert_close(
        result.scales.cpu(), expected.scales.cpu(), rtol=0, atol=0, equal_nan=True
    )


def _codes(codes: Tensor) -> Tensor:
    codes = codes.cpu().view(torch.uint8)
    return codes.masked_fill(codes & 0x7F == 0x7F, 0x7F)


def distance(result: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected, in FP64."""
    expected = expected.cpu().double()
    return float((result.detach().cpu().double() - expected).norm() / expected.norm())
