"""Scales and codes of E4M3 inside kernels: the bits of ``kernels/quantize.py``, wherever they run.

Triton's interpreter casts to E4M3 wrongly at ties and subnormals, so there codes are made by
arithmetic of integers; a GPU has an instruction. Codes leave a kernel as uint8: the stored tensor
is viewed so.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 1/448 is the sum of these but for 2^-48 of it; the first is FP32 that is below.
FIRST_448 = tl.constexpr(float.fromhex("0x1.249248p-9"))
REST_448 = tl.constexpr(float.fromhex("0x1.24924ap-33"))


def interpreted() -> bool:
    """Say whether kernels run under Triton's interpreter: their ``INTERPRETED``."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def wide(x: tl.tensor, INTERPRETED: tl.constexpr, AGAIN: tl.constexpr = False) -> tl.tensor:
    """Convert to FP32; of BF16 a pair in the two instructions that it takes."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        result = x.to(tl.float32)
    else:
        result = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x1044; prmt.b32 $1, $2, 0, 0x3244;"
            if AGAIN
            else "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=f,=f,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return result


@triton.jit
def narrow(x: tl.tensor, TYPE: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Round FP32 to ``TYPE``; to BF16 in pairs, since one by one takes a slow instruction each."""
    if INTERPRETED or TYPE != tl.bfloat16:  # noqa: SIM300
        result = x.to(TYPE)
    else:
        result = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;",
            "=r,f,f",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return result


@triton.jit
def magnitude(x: tl.tensor) -> tl.tensor:
    """Return ``|x|`` of FP32 as int32 bits, which are in the order of the numbers, NaN above all.

    The largest of them is the largest magnitude; ``tl.max`` of floats would lose a NaN.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def approximate(INSTRUCTION: tl.constexpr, x: tl.tensor) -> tl.tensor:
    """Apply one of a GPU's own functions of FP32, for which Triton has many instructions."""
    return tl.inline_asm_elementwise(
        INSTRUCTION, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def scale_of(amax: tl.tensor, POWER_OF_TWO: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Do what ``quantize.scales_of`` does, for largest magnitudes in FP32.

    On a GPU 1/448 is the sum of two numbers, the first below it: a product with both, rounded once,
    is the quotient. The tests try every mantissa.
    """
    amax = tl.maximum(amax, 1e-4, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.div_rn(amax, 448.0) if INTERPRETED else tl.fma(amax, FIRST_448, amax * REST_448)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        raised = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(scale < float("inf"), raised, scale)
    return scale


@triton.jit
def scale_of_magnitude(
    largest: tl.tensor, POWER_OF_TWO: tl.constexpr, INTERPRETED: tl.constexpr
) -> tl.tensor:
    """Return the scale of groups whose largest ``magnitude`` is given."""
    return scale_of(largest.to(tl.float32, bitcast=True), POWER_OF_TWO, INTERPRETED)


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
def quotients(
    x: tl.tensor,
    scale: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EXACT: tl.constexpr = True,
) -> tl.tensor:
    """Return ``x / scale``, rounded as a division rounds it wherever a code depends on it.

    ``scale`` has the shape of ``x`` but for dimensions of one. A group has one reciprocal, a number
    three multiplications instead of a division's dozen instructions. They can miss the division's
    last bit where a quotient lies within 2^-21 of its last place from the middle of two FP32
    numbers. Beside a tie of codes that needs a scale whose mantissa is within
    2^-20 of a multiple of 1/16; the tests try all of these, and none is missed. Where ``x`` itself
    is off by some last places, ``EXACT`` may be false: then it is one multiplication.
    """
    # Infinity times a reciprocal of zero would turn the finite numbers of its group into NaN.
    infinite = scale == float("inf")
    if POWER_OF_TWO:
        # The reciprocal of 2^n has the exponent's bits counted from the other end.
        bits = 0x7F000000 - scale.to(tl.int32, bitcast=True)
        turned = tl.where(scale < float("inf"), bits.to(tl.float32, bitcast=True), scale)
        quotient = x * tl.where(infinite, 0.0, turned)
    elif INTERPRETED:
        quotient = tl.div_rn(x, scale + tl.zeros_like(x))
    else:
        divisor = tl.where(infinite, 0.0, scale)
        # One step of Newton's brings a GPU's own reciprocal to the nearest number.
        near = approximate("rcp.approx.ftz.f32 $0, $1;", scale)
        near = tl.fma(tl.fma(divisor * -1.0, near, 1.0), near, near)
        # Multiplied by -1, since Triton's minus is a subtraction from zero. The signs of the terms
        # are those that keep a negative zero negative.
        quotient = x * near
        if EXACT:
            quotient = tl.fma(tl.fma(quotient, divisor, x * -1.0), near * -1.0, quotient)
    return quotient


@triton.jit
def encode(
    x: tl.tensor,
    scale: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EXACT: tl.constexpr = True,
) -> tl.tensor:
    """Return ``e4m3(x / scale)`` as uint8; ``scale`` may have dimensions of one."""
    return to_e4m3(quotients(x, scale, POWER_OF_TWO, INTERPRETED, EXACT), INTERPRETED)


@triton.jit
def word_of(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, INTERPRETED: tl.constexpr
) -> tl.tensor:
    """Round four FP32 tensors to E4M3 and pack their codes, the first in the lowest byte: int32.

    None may be zero for a reason that the compiler knows, as where a kernel is compiled for one row
    (``do_not_specialize``): ptxas 12.8 then leaves half of the word undefined (seen on a GPU).
    """
    if INTERPRETED:
        low = to_e4m3(a, True).to(tl.int32) | (to_e4m3(b, True).to(tl.int32) << 8)
        high = to_e4m3(c, True).to(tl.int32) | (to_e4m3(d, True).to(tl.int32) << 8)
        word = low | (high << 16)
    else:
        word = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,f,f,f,f",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return word
