"""Weights in every form that a checkpoint stores, with random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ziphius.kernels.stored import CODED, PLAIN, Codes, Weight

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
FORMS = [*(str(dtype).removeprefix("torch.") for dtype in PLAIN), *CODED]
# Of the largest number: sums in another order, and the last rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}


def random_weight(
    form: str, outer: int, inner: int, *, seed: int = 0, group: int = 64, scale_rows: int = 1
) -> Weight:
    """Draw a matrix ``[outer, inner]``; ``int4`` needs an even ``inner``."""
    generator = torch.Generator().manual_seed(seed)
    if form not in CODED:
        plain_OI = torch.randn(outer, inner, generator=generator, dtype=torch.float64)
        return (plain_OI * inner**-0.5).to(getattr(torch, form))
    width = inner // 2 if form == "int4" else inner
    data = torch.randint(0, 256, (outer, width), generator=generator).to(torch.uint8)
    if form == "fp8":
        data[data & 127 == 127] = 3  # those are NaN
    shape = (-(-outer // scale_rows), -(-inner // group))
    scales = torch.rand(shape, generator=generator) + 0.5
    largest = {"fp8": 448, "int8": 128, "int4": 8}[form]
    return Codes(data, scales / largest * inner**-0.5, form, group, scale_rows)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the numbers that a weight means."""
    return weight.decode(dtype) if isinstance(weight, Codes) else weight.to(dtype)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    assert found.shape == expected.shape
    assert found.dtype == dtype
    scale = expected.double().abs().max().clamp(min=1)
    error = (found.double() - expected.double()).abs().max() / scale
    assert error <= TOLERANCE[dtype] * roundings, error
