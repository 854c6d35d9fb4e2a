"""What tests of FP8 products share: operands, what is right, and how far off is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from ziphius.kernels.quantize import Fp8, dequantize

# The interpreter sums in FP32. Tensor cores keep about 14 bits of a sum of 128 products, and a
# result in BF16 is rounded at 2^-9.
INTERPRETED, FP32, BF16 = 1e-6, 1.5e-3, 4e-3


def on(device: torch.device, q: Fp8) -> Fp8:
    """Return operands on a device."""
    return Fp8(q.codes.to(device), q.scales.to(device), q.rows)


def exact(a: Fp8, b: Fp8) -> Tensor:
    """Return the product of the decoded operands in float64."""
    decoded = (
        dequantize(Fp8(q.codes.cpu(), q.scales.cpu(), q.rows), torch.float64) for q in (a, b)
    )
    left, right = decoded
    return left @ right.transpose(-1, -2)


def close(out: Tensor, right: Tensor) -> bool:
    """Say whether the norm of the difference is within what the place and the dtype allow."""
    allowed = INTERPRETED if out.device.type == "cpu" else FP32
    if out.dtype == torch.bfloat16:
        allowed = BF16
    difference = (out.cpu().double() - right).norm()
    return bool(difference <= allowed * right.norm())
