"""How far a kernel may be from the same in float64, by the dtype that it stores."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the norm: a few roundings of what is stored and multiplied, and sums in another order.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Compare by ``|found - exact| / |exact|``; a NaN anywhere is an error."""
    assert found.shape == exact.shape
    difference = (found.cpu().double() - exact.cpu().double()).norm()
    size = exact.cpu().double().norm()
    assert difference <= TOLERANCE[dtype] * size, f"{difference / size} of the norm"
