"""E5M6 on a GPU: the bits of ``kernels/e5m6.py``, every number read and written once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.e5m6 import E5M6
from ziphius.kernels.quantize import TILE, tile_count
from ziphius.kernels.triton.bits import interpreted, wide
from ziphius.kernels.triton.groups import larger, largest, rows_of

LEAST = tl.constexpr(-(2**31))  # the bit of the sign


class Launch(NamedTuple):
    """How much a program takes: tiles, with so many warps."""

    groups: int = 16
    warps: int = 4


CANDIDATES = (Launch(), Launch(32, 4), Launch(8, 1))


class TritonE5M6:
    """What ``TorchE5M6`` does. Rows of an input may lie apart; its last dimension may not.

    The bits of a NaN may be others.
    """

    def __init__(self, launch: Launch | None = None) -> None:
        self.launch = launch or Launch()

    def encode(self, x: Tensor) -> E5M6:
        """Do what the function ``encode`` does."""
        x_MC, width = rows_of(x), x.shape[-1]
        row = -(-width // 2) * 3
        packed = torch.empty(*x.shape[:-1], row, dtype=torch.uint8, device=x.device)
        scales = torch.empty(*x.shape[:-1], tile_count(width), dtype=torch.uint8, device=x.device)
        groups, size = scales.numel(), self.launch
        if x.numel() and width % TILE == 0 and _in_words(x_MC):
            _encode_words_kernel[(triton.cdiv(groups, size.groups),)](
                *(x_MC.view(torch.int32), packed.view(torch.int32), scales),
                *(x_MC.stride(0) // 2, width // TILE, groups),
                GROUPS=size.groups,
                INTERPRETED=interpreted(),
                num_warps=size.warps,
            )
        elif x.numel():
            _encode_e5m6_kernel[(triton.cdiv(groups, size.groups),)](
                *(x_MC, packed, scales, x_MC.stride(0), width, row, groups),
                GROUPS=size.groups,
                INTERPRETED=interpreted(),
                num_warps=size.warps,
            )
        return E5M6(packed, scales)

    def decode(self, q: E5M6, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Do what the function ``decode`` does."""
        out = torch.empty(*q.packed.shape[:-1], width, dtype=dtype, device=q.packed.device)
        groups, size, row = q.scales.numel(), self.launch, q.packed.shape[-1]
        packed, scales = q.packed.contiguous(), q.scales.contiguous()
        if out.numel() and width % TILE == 0 and dtype == torch.bfloat16:
            _decode_words_kernel[(triton.cdiv(groups, size.groups),)](
                *(packed.view(torch.int32), scales, out.view(torch.int32), groups),
                GROUPS=size.groups,
                INTERPRETED=interpreted(),
                num_warps=size.warps,
            )
        elif out.numel():
            _decode_e5m6_kernel[(triton.cdiv(groups, size.groups),)](
                *(packed, scales, out, width, row, groups),
                GROUPS=size.groups,
                num_warps=size.warps,
            )
        return out


def _in_words(x_MC: Tensor) -> bool:
    """Say whether pairs of numbers are words that a kernel can read: BF16, all at even places."""
    even = x_MC.stride(0) % 2 == 0 and x_MC.storage_offset() % 2 == 0
    return x_MC.dtype == torch.bfloat16 and even


@triton.jit
def _encode_words_kernel(
    x, packed, scales, stride, tiles, groups,
    GROUPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Encode whole tiles of BF16, two numbers a word, in about half the instructions.

    BF16 has one bit of fraction more than E5M6, so that half precision holds a normal number as it
    is, and what is rounded is an integer, two at once. Smaller ones are rounded to 2^-20, the place
    of E5M6's last bit there, by adding 12 and taking it off: a number of 8 significant bits that is
    at least 2^-13 stays as it is, since its sum with 12 needs 24 bits or less.
    """
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    there = (group < groups)[:, None]
    at, first = (group // tiles)[:, None].to(tl.int64), (group % tiles)[:, None]
    pair = tl.arange(0, 64)[None, :]
    word = tl.load(x + at * stride + (first * 64 + pair), mask=there, other=0)
    even = (word << 16).to(tl.float32, bitcast=True)
    odd = (word & -65536).to(tl.float32, bitcast=True)
    top = largest(larger(tl.abs(even), tl.abs(odd)), 1, INTERPRETED)
    finite = top < 0x7F800000
    exponent = ((tl.maximum(top, 0x38D1B717) + 0x1FFFF) >> 23) - 15  # of 1e-4 and more
    tl.store(scales + group, tl.where(finite, exponent, 255).to(tl.uint8), mask=group < groups)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    codes = _pair_of_words(
        tl.fma(even, inverse, 12.0) - 12.0, tl.fma(odd, inverse, 12.0) - 12.0, word, INTERPRETED
    )
    w0, w1, w2, w3 = _fours(codes)
    a, b, c = _three(w0, w1, w2, w3, INTERPRETED)
    # A tile with a number that is not finite has nothing but ones, which are NaN.
    bad = tl.where(finite, 0, -1)[:, None]
    a, b, c = a | bad, b | bad, c | bad
    _store_words(packed + (at * tiles + first) * 48, a, b, c, there)


@triton.jit
def _pair_of_words(even, odd, word, INTERPRETED: tl.constexpr):
    """Round two numbers that half precision holds, and pack their codes: 24 bits, int32.

    ``word`` has their signs, which zeros have lost. Half of the last bit is added where that is
    one: to nearest, ties to even, as what is dropped is nothing or half.
    """
    if INTERPRETED:
        low = even.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
        both = low | (odd.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32) << 16)
        both |= word & -0x7FFF8000
        both += (both & 0x00100010) >> 1
        result = ((both >> 4) & 0xFFF) | ((both >> 8) & 0xFFF000)
    else:
        result = tl.inline_asm_elementwise(
            """{
            .reg .b32 both, bit, low, high;
            cvt.rn.f16x2.f32 both, $2, $1;
            lop3.b32 both, both, $3, 0x80008000, 0xF8;
            and.b32 bit, both, 0x00100010;
            shr.u32 bit, bit, 1;
            add.u32 both, both, bit;
            shr.u32 low, both, 4;
            shr.u32 high, both, 8;
            lop3.b32 $0, low, high, 0xFFF, 0xE4;
            }""",
            "=r,f,f,r",
            [even, odd, word],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return result


@triton.jit
def _three(w0, w1, w2, w3, INTERPRETED: tl.constexpr):
    """Put four times 24 bits into three words."""
    if INTERPRETED:
        a, b, c = w0 | (w1 << 24), (w1 >> 8) | (w2 << 16), (w2 >> 16) | (w3 << 8)
    else:
        a, b, c = tl.inline_asm_elementwise(
            "prmt.b32 $0, $3, $4, 0x4210; prmt.b32 $1, $4, $5, 0x5421;"
            " prmt.b32 $2, $5, $6, 0x6542;",
            "=r,=r,=r,r,r,r,r",
            [w0, w1, w2, w3],
            dtype=(tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return a, b, c


@triton.jit
def _fours(x):
    """Return every fourth column, beginning at each of the first four."""
    even, odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    x0, x2 = tl.split(even.reshape(x.shape[0], x.shape[1] // 4, 2))
    x1, x3 = tl.split(odd.reshape(x.shape[0], x.shape[1] // 4, 2))
    return x0, x1, x2, x3


@triton.jit
def _store_words(place, a, b, c, there):
    """Store sixteen times three words a group, 16 bytes at a time."""
    a0, a1, a2, a3 = _fours(a)
    b0, b1, b2, b3 = _fours(b)
    c0, c1, c2, c3 = _fours(c)
    word = tl.arange(0, 16)[None, :]
    place += word // 4 * 12 + word % 4
    tl.store(place, _in_order(a0, b0, c0, a1), mask=there)
    tl.store(place + 4, _in_order(b1, c1, a2, b2), mask=there)
    tl.store(place + 8, _in_order(c2, a3, b3, c3), mask=there)


@triton.jit
def _in_order(w0, w1, w2, w3):
    """Put four tensors side by side, element by element."""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(w0.shape[0], 4 * w0.shape[1])


@triton.jit
def _decode_words_kernel(
    packed, scales, out, groups, GROUPS: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Decode whole tiles to BF16, two numbers a word."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    there, begin = (group < groups)[:, None], group.to(tl.int64)[:, None]
    exponent = tl.load(scales + group, mask=group < groups, other=127).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)[:, None]
    place = packed + begin * 48
    # The compiler gives every third place to threads far apart unless it takes two for neighbours;
    # their alignment, of one, keeps it from moving two at once.
    place += tl.max_contiguous(tl.arange(0, 16) * 3, 2)[None, :]
    a = tl.load(place, mask=there, other=0)
    b = tl.load(place + 1, mask=there, other=0)
    c = tl.load(place + 2, mask=there, other=0)
    words = _eight(a, b, c, scale, INTERPRETED)
    tl.store(out + begin * 64 + tl.arange(0, 64)[None, :], words, mask=there)


@triton.jit
def _eight(a, b, c, scale, INTERPRETED: tl.constexpr):
    """Return the eight numbers of three words as four words of BF16, side by side."""
    if INTERPRETED:
        w1, w2, w3 = ((a >> 24) & 0xFF) | (b << 8), ((b >> 16) & 0xFFFF) | (c << 16), c >> 8
    else:
        w1, w2, w3 = tl.inline_asm_elementwise(
            "prmt.b32 $0, $3, $4, 0x6543; prmt.b32 $1, $4, $5, 0x5432; shr.u32 $2, $5, 8;",
            "=r,=r,=r,r,r,r",
            [a, b, c],
            dtype=(tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    scale = tl.broadcast_to(scale, a.shape)
    y0, y1 = _two(a, scale, INTERPRETED), _two(w1, scale, INTERPRETED)
    y2, y3 = _two(w2, scale, INTERPRETED), _two(w3, scale, INTERPRETED)
    return _in_order(y0, y1, y2, y3)


@triton.jit
def _two(word, scale, INTERPRETED: tl.constexpr):
    """Return the two numbers in the lower 24 bits as a word of BF16, which holds them."""
    if INTERPRETED:
        low = ((word << 4) & 0xFFF0).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = ((word >> 8) & 0xFFF0).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        low = (low * scale).to(tl.int32, bitcast=True)
        result = ((low >> 16) & 0xFFFF) | ((high * scale).to(tl.int32, bitcast=True) & -65536)
    else:
        result = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, both;
            .reg .b16 first, second;
            .reg .f32 x, y;
            shl.b32 low, $1, 4;
            shl.b32 high, $1, 8;
            lop3.b32 both, low, high, 0xFFF0, 0xE4;
            and.b32 both, both, 0xFFF0FFF0;
            mov.b32 {first, second}, both;
            cvt.f32.f16 x, first;
            cvt.f32.f16 y, second;
            mul.f32 x, x, $2;
            mul.f32 y, y, $2;
            cvt.rn.bf16x2.f32 $0, y, x;
            }""",
            "=r,r,f",
            [word, scale],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return result


@triton.jit
def _encode_e5m6_kernel(
    x, packed, scales, stride, width, row, groups,
    GROUPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Encode tiles of any numbers, the last ones of rows not whole, byte by byte."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    there, tiles = (group < groups)[:, None], (width + 127) // 128
    at = (group // tiles)[:, None].to(tl.int64)
    pair = (group % tiles * 64)[:, None] + tl.arange(0, 64)[None, :]
    # Of each pair both are read apart: bytes that change threads would be mixed up (Triton 3.6).
    even = tl.load(x + at * stride + pair * 2, mask=there & (pair * 2 < width), other=0.0)
    odd = tl.load(x + at * stride + pair * 2 + 1, mask=there & (pair * 2 + 1 < width), other=0.0)
    even, odd = wide(even, INTERPRETED), wide(odd, INTERPRETED)
    top = largest(larger(tl.abs(even), tl.abs(odd)), 1, INTERPRETED)
    finite = top < 0x7F800000
    exponent = ((tl.maximum(top, 0x38D1B717) + 0x1FFFF) >> 23) - 15  # of 1e-4 and more
    exponent = tl.where(finite, exponent, 255)
    tl.store(scales + group, exponent.to(tl.uint8), mask=group < groups)
    inverse = tl.where(finite, (254 - exponent) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    inverse = inverse[:, None]
    pairs = _pair(_round(even * inverse), _round(odd * inverse), INTERPRETED)
    place = packed + at * row + pair * 3
    for byte in tl.static_range(3):
        code = (pairs >> (8 * byte)).to(tl.uint8)
        tl.store(place + byte, code, mask=there & (pair * 2 < width))


@triton.jit
def _round(x):
    """Round FP32 numbers up to 65024 to E5M6, to nearest even.

    Adding a number of 2^17 times the size leaves no place for the bits to drop: the adder rounds.
    """
    bits = x.to(tl.int32, bitcast=True)
    # At least the smallest normal number's; 1.5 times, so that signs do not matter.
    binade = tl.maximum(bits & 0x7F800000, 0x38800000).to(tl.float32, bitcast=True)
    sum = tl.fma(binade, 1.5 * 2.0**17, x)
    rounded = tl.fma(binade, -1.5 * 2.0**17, sum).to(tl.int32, bitcast=True)
    return (rounded | (bits & LEAST)).to(tl.float32, bitcast=True)


@triton.jit
def _pair(even, odd, INTERPRETED: tl.constexpr):
    """Pack two codes, each the upper twelve bits of a number in half precision: 24 bits, int32."""
    if INTERPRETED:
        low = even.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
        both = low | (odd.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32) << 16)
    else:
        both = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;",
            "=r,f,f",
            [even, odd],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return ((both >> 4) & 0xFFF) | ((both >> 8) & 0xFFF000)


@triton.jit
def _decode_e5m6_kernel(packed, scales, out, width, row, groups, GROUPS: tl.constexpr):
    """Decode what ``_encode_e5m6_kernel`` encodes."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    there, tiles = (group < groups)[:, None], (width + 127) // 128
    at, first = (group // tiles)[:, None].to(tl.int64), (group % tiles * 128)[:, None]
    column = first + tl.arange(0, 128)[None, :]
    inside = there & (column < width)
    # A code's twelve bits lie in two neighbouring bytes, an odd one's shifted by four.
    byte = packed + at * row + column // 2 * 3 + column % 2
    low = tl.load(byte, mask=inside, other=0).to(tl.uint32)
    high = tl.load(byte + 1, mask=inside, other=0).to(tl.uint32)
    half = ((low | (high << 8)) >> (column % 2 * 4).to(tl.uint32)) << 4
    half = (half & 0xFFF0).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    exponent = tl.load(scales + group, mask=group < groups, other=127).to(tl.int32)
    value = half * (exponent << 23).to(tl.float32, bitcast=True)[:, None]
    tl.store(out + at * width + column, value.to(out.dtype.element_ty), mask=inside)
