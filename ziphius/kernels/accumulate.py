"""How Hopper's tensor cores add FP8 products, bit by bit, and what promotion does (facts 4.3).

One instruction adds 32 products of two E4M3 numbers to an accumulator. All 33 terms are shifted
right until they have the exponent of the largest one, and what leaves the register on the right is
cut off: 14 bits stay, the leading one and 13 of fraction. The sum is cut to 14 bits once more, as
the accumulator has no others. Over a long K the accumulator grows, and ever more of each product is
lost: *promotion* moves the partial sum to an FP32 total every 128 of K, and starts again from zero.

Details that are unpublished, as we have them: the exponent of a product is that of its value, not
the sum of its factors' exponents; bits are cut off the magnitude, so towards zero.

**34 bits.** The report says that 32 products need at least 34 bits for a precise FP32 result. We
read it so: the sum is a fixed-point number of that many bits besides the sign. Five of them are for
carries (32 terms), which leaves ``kept = bits - 5`` to each aligned product; the sum is precise if
it is less than one unit of FP32's last place off, the place taken at the largest term. FP32 has 24
bits, and 32 terms lose less than one such unit together if each keeps five more: 5 + 24 + 5 = 34.
With 33 there are products that lose 1.7 units. Adding without any loss takes 41 bits: from 2^-18,
the square of the smallest E4M3 number, up to 32 * 448^2 < 2^23.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.kernels.quantize import TILE, Fp8

INSTRUCTION = 32
HOPPER_BITS = 14
_FRACTION_BITS = 23
# 33 integers of so many bits add up exactly in FP32.
_FP32_BITS = 18


def accumulate(
    a_MK: Tensor,
    b_NK: Tensor,
    interval: int | None = None,
    *,
    kept: int = HOPPER_BITS,
    register: int = HOPPER_BITS,
) -> Tensor:
    """Return ``a b^T`` ``[M, N]``, FP32, of E4M3 numbers in any float dtype, added as above.

    Every ``interval`` of K, a multiple of 32, the partial sum is added to an FP32 total; with None
    never. ``kept`` bits stay of an aligned term (at most 29), ``register`` bits of their sum (at
    most 24). Memory: 32 intermediate numbers an output.
    """
    if interval is not None and (interval < 1 or interval % INSTRUCTION):
        raise BadInput(f"promotion every {interval} of K: a multiple of {INSTRUCTION} is needed")
    (M, K), N = a_MK.shape, len(b_NK)
    working = torch.float32 if kept <= _FP32_BITS else torch.float64
    a_KM, b_KN = (x.to(torch.float32).T.contiguous() for x in (a_MK, b_NK))
    total_MN = torch.zeros(M, N, dtype=torch.float32, device=a_MK.device)
    partial_MN = torch.zeros_like(total_MN)
    # Terms come first: reductions over a short last dimension are slow.
    terms = torch.empty(INSTRUCTION + 1, M, N, dtype=torch.float32, device=a_MK.device)
    for start in range(0, K, INSTRUCTION):
        if interval is not None and start and start % interval == 0:
            total_MN += partial_MN
            partial_MN.zero_()
        width = min(INSTRUCTION, K - start)
        rows = slice(start, start + width)
        torch.mul(a_KM[rows, :, None], b_KN[rows, None, :], out=terms[:width])
        terms[width] = partial_MN
        partial_MN.copy_(_cut(add_aligned(terms[: width + 1], kept, working), register))
    return total_MN.add_(partial_MN)


def gemm_hopper(a: Fp8, b: Fp8, dtype: torch.dtype) -> Tensor:
    """Multiply as ``gemm.gemm_reference`` does, but add up the 128 of a group as Hopper does."""
    N, K = b.codes.shape
    scales_NG = b.scales.repeat_interleave(b.rows, 0)[:N]
    total_MN = torch.zeros(len(a.codes), N, dtype=torch.float32, device=a.codes.device)
    for group, start in enumerate(range(0, K, TILE)):
        columns = slice(start, start + TILE)
        partial_MN = accumulate(a.codes[:, columns], b.codes[:, columns])
        total_MN += partial_MN * (a.scales[:, group, None] * scales_NG[:, group])
    return total_MN.to(dtype)


def add_aligned(terms: Tensor, kept: int, working: torch.dtype) -> Tensor:
    """Cut terms ``[T, ...]`` at the last of ``kept`` places from the largest down; add exactly."""
    largest = terms.abs().amax(0)
    # The power of two at or below the largest; zeros keep a place that exists.
    leading = (largest.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**-60)
    place = (leading * 2.0 ** (1 - kept)).to(working)
    return (terms.to(working) / place).trunc_().sum(0) * place


def _cut(x: Tensor, bits: int) -> Tensor:
    """Cut numbers to ``bits`` significant bits, towards zero, in FP32."""
    if x.dtype == torch.float64:
        # The conversion would round: first to what FP32 holds.
        x = (x.view(torch.int64) & ~((1 << (52 - _FRACTION_BITS)) - 1)).view(torch.float64)
    dropped = (1 << (_FRACTION_BITS + 1 - bits)) - 1
    return (x.float().view(torch.int32) & ~dropped).view(torch.float32)
