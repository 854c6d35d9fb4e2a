"""Units: four channels of a row, which a thread loads at once as one integer, and their columns.

For ``squares.py``, which says what is gained.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ziphius.kernels.triton.bits import magnitude, scale_of_magnitude, word_of
from ziphius.kernels.triton.groups import larger

# What products in FP32 are multiplied by in ``regroup`` and SwiGLU: see ``reciprocal``. Nothing
# that decides a code is near the ends of FP32's range then: codes come from numbers of 2^-32 on.
SMALLER = tl.constexpr(2.0**-32)


@triton.jit
def largest_pair(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """Return the larger magnitudes of two pairs of BF16, NaN where one is; signs mean nothing."""
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;",
        "=r,r,r",
        [x, y],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def largest_two(a, b, c, d):
    return largest_pair(a, c), largest_pair(b, d)


@triton.jit
def larger_four(a, b, c, d, e, f, g, h):
    return larger(a, e), larger(b, f), larger(c, g), larger(d, h)


@triton.jit
def largest_four(a, b, c, d, e, f, g, h):
    return largest_pair(a, e), largest_pair(b, f), largest_pair(c, g), largest_pair(d, h)


@triton.jit
def lower(word: tl.tensor) -> tl.tensor:
    """Return the first of two BF16 in FP32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def upper(word: tl.tensor) -> tl.tensor:
    """Return the second of two BF16 in FP32."""
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _decoded(word: tl.tensor, byte: tl.constexpr) -> tl.tensor:
    """Return a code in FP32, by arithmetic: exponents count from 7 there, from 127 here."""
    code = (word >> (8 * byte)) & 0xFF
    size = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120
    size = tl.where((code & 0x7F) == 0x7F, float("nan"), size)
    return tl.where(code >= 128, size * -1.0, size)  # a minus would subtract from zero


@triton.jit
def decoded(word: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Return the four codes of a word in FP32."""
    if INTERPRETED:
        result = _decoded(word, 0), _decoded(word, 1), _decoded(word, 2), _decoded(word, 3)
    else:
        result = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high, a, b, c, d;
            .reg .b32 first, second;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 first, low;
            cvt.rn.f16x2.e4m3x2 second, high;
            mov.b32 {a, b}, first;
            mov.b32 {c, d}, second;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.f32.f16 $2, c;
            cvt.f32.f16 $3, d;
            }""",
            "=f,=f,=f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return result


@triton.jit
def with_products(g: tl.tensor, u: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Return the four codes of a word in FP32, and a quarter of their products with another's.

    Both exact: FP16 holds eight bits of mantissa from 2^-20 to 448^2 / 4.
    """
    if INTERPRETED:
        a, b, c, d = decoded(g, True)
        e, f, m, n = decoded(u, True)
        result = a, b, c, d, a * e * 0.25, b * f * 0.25, c * m * 0.25, d * n * 0.25
    else:
        result = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high, a, b, c, d;
            .reg .b32 first, second, third, fourth, quarter;
            mov.b32 quarter, 0x34003400;
            mov.b32 {low, high}, $8;
            cvt.rn.f16x2.e4m3x2 first, low;
            cvt.rn.f16x2.e4m3x2 second, high;
            mov.b32 {low, high}, $9;
            cvt.rn.f16x2.e4m3x2 third, low;
            cvt.rn.f16x2.e4m3x2 fourth, high;
            mul.rn.f16x2 third, third, quarter;
            mul.rn.f16x2 fourth, fourth, quarter;
            mul.rn.f16x2 third, third, first;
            mul.rn.f16x2 fourth, fourth, second;
            mov.b32 {a, b}, first;
            mov.b32 {c, d}, second;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.f32.f16 $2, c;
            cvt.f32.f16 $3, d;
            mov.b32 {a, b}, third;
            mov.b32 {c, d}, fourth;
            cvt.f32.f16 $4, a;
            cvt.f32.f16 $5, b;
            cvt.f32.f16 $6, c;
            cvt.f32.f16 $7, d;
            }""",
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,r",
            [g, u],
            dtype=(tl.float32,) * 8,
            is_pure=True,
            pack=1,
        )
    return result


@triton.jit
def reciprocal(
    scale: tl.tensor, POWER_OF_TWO: tl.constexpr, INTERPRETED: tl.constexpr
) -> tl.tensor:
    """Return two numbers whose sum is ``1 / scale`` but for 2^-46 of it, none of them negative.

    The first is chopped, so that the second does not turn the sign of a negative zero. An infinite
    scale has zeros. Of a scale above 2^105 the second has fewer than 24 bits, since it is below the
    normal numbers. That decides no code of a BF16 number whose group is of BF16 (the tests try all
    of them); FP32 may come multiplied by a small power of two, as its scale (``SMALLER``).
    """
    if INTERPRETED:
        result = scale, scale
    elif POWER_OF_TWO:
        bits = 0x7F000000 - scale.to(tl.int32, bitcast=True)
        turned = tl.where(scale < float("inf"), bits.to(tl.float32, bitcast=True), scale)
        turned = tl.where(scale == float("inf"), 0.0, turned)
        result = turned, turned
    else:
        result = tl.inline_asm_elementwise(
            """{
            .reg .f32 near, minus, off;
            rcp.approx.ftz.f32 near, $2;
            min.f32 minus, $2, 0f7F7FFFFF;
            neg.f32 minus, minus;
            fma.rn.f32 off, minus, near, 0f3F800000;
            fma.rz.f32 near, off, near, near;
            fma.rn.f32 off, minus, near, 0f3F800000;
            mul.rn.f32 off, off, near;
            max.f32 off, off, 0f00000000;
            mov.f32 $0, near;
            mov.f32 $1, off;
            }""",
            "=&f,=&f,f",
            [scale],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return result


@triton.jit
def divided(
    x: tl.tensor,
    parts: tl.tensor,
    axis: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EXACT: tl.constexpr = True,
) -> tl.tensor:
    """Return ``x / scale`` by the parts of a ``reciprocal`` along a dimension.

    As ``bits.quotients``: wherever a code depends on it, it is rounded as a division is.
    """
    first, rest = tl.expand_dims(parts[0], axis), tl.expand_dims(parts[1], axis)
    if INTERPRETED:
        quotient = tl.div_rn(x, first + tl.zeros_like(x))
    elif EXACT and not POWER_OF_TWO:
        quotient = tl.fma(x, tl.broadcast_to(first, x.shape), x * rest)
    else:
        quotient = x * first
    return quotient


@triton.jit
def load_units(
    units: tl.tensor,
    quarter: tl.constexpr,
    first: tl.tensor,
    filled: tl.tensor,
    STRIDE: tl.constexpr,
    unit: tl.tensor,
) -> tl.tensor:
    """Read every fourth row of 128, units ``[U]``: ``[32, U]``; zeros where there is no row."""
    line = tl.arange(0, 32) * 4 + quarter
    at = units + first.to(tl.int64) * STRIDE + (line * STRIDE)[:, None] + unit[None, :]
    return tl.load(at, mask=(line < filled)[:, None], other=0)


@triton.jit
def four(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Interleave four ``[.., U]`` along the last dimension: ``[.., 4 U]``; nothing is moved."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))
    if len(a.shape) == 1:
        result = tl.reshape(joined, (4 * a.shape[0],))
    else:
        result = tl.reshape(joined, (a.shape[0], 4 * a.shape[1]))
    return result


@triton.jit
def numbers_of(words):
    """Return the four channels of units of BF16, given as two words, in FP32."""
    low, high = words
    return lower(low), upper(low), lower(high), upper(high)


@triton.jit
def largest_of(numbers):
    """Return the largest magnitude of a unit's four channels, NaN where one is."""
    a, b, c, d = numbers
    return larger(larger(tl.abs(a), tl.abs(b)), larger(tl.abs(c), tl.abs(d)))


@triton.jit
def largest_along(x: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """Return the largest of FP32 that are not negative, for the interpreter."""
    return tl.max(x.to(tl.int32, bitcast=True), AXIS).to(tl.float32, bitcast=True)


@triton.jit
def tops_of(a, b, c, d, INTERPRETED: tl.constexpr):
    """Return the largest magnitudes of columns: four ``[U]``; a quarter is four ``[32, U]``."""
    t0, t1 = largest_of((a[0], b[0], c[0], d[0])), largest_of((a[1], b[1], c[1], d[1]))
    t2, t3 = largest_of((a[2], b[2], c[2], d[2])), largest_of((a[3], b[3], c[3], d[3]))
    if INTERPRETED:
        tops = (
            largest_along(t0, 0),
            largest_along(t1, 0),
            largest_along(t2, 0),
            largest_along(t3, 0),
        )
    else:
        tops = tl.reduce((t0, t1, t2, t3), 0, larger_four)
    return tops


@triton.jit
def quantised(
    numbers,
    top: tl.tensor,
    AXIS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EXACT: tl.constexpr = True,
    TIMES: tl.constexpr = 1.0,
):
    """Return the codes of four tensors as words, and the scale of their largest, ``top``.

    ``AXIS`` is the one that ``top`` lacks. Numbers and ``top`` come multiplied by ``TIMES``, a
    power of two; the scale does not.
    """
    top *= 1.0 / TIMES
    scale = scale_of_magnitude(magnitude(top), POWER_OF_TWO, INTERPRETED)
    parts = reciprocal(scale * TIMES, POWER_OF_TWO, INTERPRETED)
    word = word_of(
        divided(numbers[0], parts, AXIS, POWER_OF_TWO, INTERPRETED, EXACT),
        divided(numbers[1], parts, AXIS, POWER_OF_TWO, INTERPRETED, EXACT),
        divided(numbers[2], parts, AXIS, POWER_OF_TWO, INTERPRETED, EXACT),
        divided(numbers[3], parts, AXIS, POWER_OF_TWO, INTERPRETED, EXACT),
        INTERPRETED,
    )
    return word, scale


@triton.jit
def store_columns(
    a,
    b,
    c,
    d,
    tops,
    codes: tl.tensor,
    scales: tl.tensor,
    channel: tl.tensor,
    tile: tl.tensor,
    width: tl.tensor,
    CHANNELS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EXACT: tl.constexpr = True,
    TIMES: tl.constexpr = 1.0,
) -> None:
    """Quantise columns and store them as rows from ``channel`` on.

    Each quarter is the four channels of its units; ``tops`` are the columns' largest magnitudes.
    """
    of0 = a[0], b[0], c[0], d[0]
    w0, s0 = quantised(of0, tops[0], 0, POWER_OF_TWO, INTERPRETED, EXACT, TIMES)
    of1 = a[1], b[1], c[1], d[1]
    w1, s1 = quantised(of1, tops[1], 0, POWER_OF_TWO, INTERPRETED, EXACT, TIMES)
    of2 = a[2], b[2], c[2], d[2]
    w2, s2 = quantised(of2, tops[2], 0, POWER_OF_TWO, INTERPRETED, EXACT, TIMES)
    of3 = a[3], b[3], c[3], d[3]
    w3, s3 = quantised(of3, tops[3], 0, POWER_OF_TWO, INTERPRETED, EXACT, TIMES)
    row, begin = tl.arange(0, CHANNELS), channel.to(tl.int64)
    at = (row * (width // 4))[:, None] + (tile * 32 + tl.arange(0, 32))[None, :]
    tl.store(codes + begin * (width // 4) + at, tl.trans(four(w0, w1, w2, w3)))
    at = row * (width // 128) + tile
    tl.store(scales + begin * (width // 128) + at, four(s0, s1, s2, s3))
