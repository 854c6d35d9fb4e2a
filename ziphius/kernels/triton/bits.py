"""Scales and codes of E4M3 inside kernels: the bits of ``kernels/quantize.py``, wherever they run.

Triton's interpreter casts to E4M3 wrongly at ties and subnormals, so there codes are made by
arithmetic of integers; a GPU has an instruction. Codes leave a kernel as uint8: the stored tensor
is viewed so.
"""

from __future__ import annotations

import triton
import triton.language as tl


def interpreted() -> bool:
    """Say whether kernels run under Triton's interpreter: their ``INTERPRETED``."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def magnitude(x: tl.tensor) -> tl.tensor:
    """Return ``|x|`` of FP32 as int32 bits, which are in the order of the numbers, NaN above all.

    The largest of them is the largest magnitude; ``tl.max`` of floats would lose a NaN.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(amax: tl.tensor, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """Do what ``quantize.scales_of`` does, for largest magnitudes in FP32."""
    scale = tl.div_rn(tl.where(amax < 1e-4, 1e-4, amax), 448.0)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        raised = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(scale < float("inf"), raised, scale)
    return scale


@triton.jit
def scale_of_magnitude(largest: tl.tensor, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """Return the scale of groups whose largest ``magnitude`` is given."""
    return scale_of(largest.to(tl.float32, bitcast=True), POWER_OF_TWO)


@triton.jit
def to_e4m3(x: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Round FP32 to E4M3, to nearest even: codes as uint8, NaN 0x7F.

    Beyond 448 it saturates, as the instruction does; what is divided by its scale never is.
    """
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # Three bits of mantissa stay of 23; the exponent's bias goes from 127 to 7.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
        # 2^14 has the last place of a subnormal code, 2^-9: adding it rounds.
        shifted = size.to(tl.float32, bitcast=True) + 16384.0
        small = shifted.to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < 0x3C800000, small, tl.minimum(normal, 0x7E))
        signed = code | ((bits >> 24) & 0x80)
        result = tl.where(size > 0x7F800000, 0x7F, signed).to(tl.uint8)
    else:
        result = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return result


@triton.jit
def encode(
    x: tl.tensor, scale: tl.tensor, POWER_OF_TWO: tl.constexpr, INTERPRETED: tl.constexpr
) -> tl.tensor:
    """Return ``e4m3(x / scale)`` as uint8, the quotient rounded as a division rounds it.

    ``scale`` has the shape of ``x`` but for dimensions of one. A group has one division, for its
    reciprocal; a number has three multiplications instead of a division's dozen instructions. They
    can miss the division's last bit where a quotient lies within 2^-21 of its last place from the
    middle of two FP32 numbers. Beside a tie of codes that needs a scale whose mantissa is within
    2^-20 of a multiple of 1/16; the tests try all of these, and none is missed.
    """
    # Infinity times a reciprocal of zero would turn the finite numbers of its group into NaN.
    divisor = tl.where(scale == float("inf"), 0.0, scale)
    if POWER_OF_TWO:
        # The reciprocal of 2^n has the exponent's bits counted from the other end.
        bits = scale.to(tl.int32, bitcast=True)
        turned = (0x7F000000 - bits).to(tl.float32, bitcast=True)
        quotient = x * tl.where(scale < float("inf"), turned, divisor)
    elif INTERPRETED:
        quotient = tl.div_rn(x, scale + tl.zeros_like(x))
    else:
        reciprocal = tl.div_rn(1.0, scale)
        # Multiplied by -1, since Triton's minus is a subtraction from zero. The signs of the terms
        # are those that keep a negative zero negative.
        back, negative = reciprocal * -1.0, x * -1.0
        quotient = x * reciprocal
        quotient = tl.fma(tl.fma(quotient, divisor, negative), back, quotient)
    return to_e4m3(quotient, INTERPRETED)
