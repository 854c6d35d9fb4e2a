"""The FP8 product ``A B^T``: groups of 128 are summed, scaled, and added up in FP32 (facts 4.3).

The three products of a linear layer are this one (facts 4.6): ``x W^T``, ``dy (W^T)^T`` and
``dy^T (x^T)^T``, with the weight transposed as a whole and both operands of the last one turned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ziphius.kernels.cpu.library import Library
from ziphius.kernels.quantize import TILE, Fp8, dequantize


def gemm_reference(a: Fp8, b: Fp8, dtype: torch.dtype) -> Tensor:
    """Multiply ``a`` ``[M, K]`` in tiles by ``b`` ``[N, K]`` in tiles or blocks: ``[M, N]``.

    Every 128 of K the partial sum of the codes' products, in FP32, is multiplied by both scales and
    added to an FP32 total, which is rounded once to ``dtype`` (report section 3.3.2).
    """
    (M, K), N = a.codes.shape, b.codes.shape[0]
    total_MN = torch.zeros(M, N, dtype=torch.float32, device=a.codes.device)
    scales_NG = b.scales.repeat_interleave(b.rows, 0)[:N]
    for group, start in enumerate(range(0, K, TILE)):
        columns = slice(start, start + TILE)
        partial_MN = a.codes[:, columns].float() @ b.codes[:, columns].float().T
        scale_MN = a.scales[:, group, None] * scales_NG[:, group]
        total_MN += partial_MN * scale_MN
    return total_MN.to(dtype)


def gemm_dequantized(a: Fp8, b: Fp8, dtype: torch.dtype) -> Tensor:
    """Do the same by one product of ``code * scale`` in FP32, for processors without FP8.

    It sums in another order and rounds each operand once, at 2^-24.
    """
    return (dequantize(a) @ dequantize(b).T).to(dtype)


def gemm_compiled(library: Library, a: Fp8, b: Fp8, dtype: torch.dtype) -> Tensor:
    """Do what the reference does; sums of 128 are taken in another order.

    No number depends on how many rows, columns or threads there are.
    """
    (M, K), N = a.codes.shape, b.codes.shape[0]
    out_MN = empty_product(M, N, dtype=dtype)
    library.call("fp8_gemm", out_MN.dtype, *factors(a, b), b.rows, out_MN, None, 1, M, N, K)
    return out_MN.to(dtype)


def factors(a: Fp8, b: Fp8) -> tuple[Tensor, ...]:
    """Return codes and scales as compiled products take them: one row after the other."""
    return tuple(x.contiguous() for x in (*a[:2], *b[:2]))


def empty_product(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return memory for a product, undefined: BF16, or FP32 for what else it is to become."""
    return torch.empty(shape, dtype=dtype if dtype == torch.bfloat16 else torch.float32)


VERSIONS: dict[str, Callable[[Fp8, Fp8, torch.dtype], Tensor]] = {
    "reference": gemm_reference,
    "dequantized": gemm_dequantized,
}
COMPILED = gemm_compiled
