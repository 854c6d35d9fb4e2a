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
from ziphius.kernels.triton.groups import largest, rows_of

LEAST = tl.constexpr(-(2**31))  # the bit of the sign


class Launch(NamedTuple):
    """How much a program takes: tiles, with so many warps; ``wide`` stores 16 bytes at a time."""

    groups: int = 32
    warps: int = 4
    wide: bool = True


CANDIDATES = (
    Launch(),
    Launch(32, 4, False),
    Launch(64, 4),
    Launch(64, 8),
    Launch(64, 4, False),
    Launch(16, 1),
)


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
        if groups and x.numel():
            whole = width % TILE == 0
            _encode_e5m6_kernel[(triton.cdiv(groups, size.groups),)](
                x_MC,
                packed.view(torch.int32) if whole else packed,
                scales,
                x_MC.stride(0),
                width,
                row,
                groups,
                GROUPS=size.groups,
                WHOLE=whole,
                WIDE=size.wide,
                INTERPRETED=interpreted(),
                num_warps=size.warps,
            )
        return E5M6(packed, scales)

    def decode(self, q: E5M6, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Do what the function ``decode`` does."""
        out = torch.empty(*q.packed.shape[:-1], width, dtype=dtype, device=q.packed.device)
        groups, size, row = q.scales.numel(), self.launch, q.packed.shape[-1]
        if out.numel():
            whole = width % TILE == 0
            packed = q.packed.contiguous()
            _decode_e5m6_kernel[(triton.cdiv(groups, size.groups),)](
                packed.view(torch.int32) if whole else packed,
                q.scales.contiguous(),
                out,
                width,
                row,
                groups,
                GROUPS=size.groups,
                WHOLE=whole,
                num_warps=size.warps,
            )
        return out


@triton.jit
def _encode_e5m6_kernel(
    x, packed, scales, stride, width, row, groups,
    GROUPS: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    there, tiles = (group < groups)[:, None], (width + 127) // 128
    at, first = (group // tiles)[:, None].to(tl.int64), (group % tiles * 128)[:, None]
    column = first + tl.arange(0, 128)[None, :]
    values = tl.load(x + at * stride + column, mask=there & (column < width), other=0.0)
    values = wide(values, INTERPRETED)
    top = largest(values, 1, INTERPRETED)
    finite = top < 0x7F800000
    exponent = ((tl.maximum(top, 0x38D1B717) + 0x1FFFF) >> 23) - 15  # of 1e-4 and more
    exponent = tl.where(finite, exponent, 255)
    tl.store(scales + group, exponent.to(tl.uint8), mask=group < groups)
    inverse = tl.where(finite, (254 - exponent) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    even, odd = tl.split(_round(values * inverse[:, None]).reshape(GROUPS, 64, 2))
    pairs = _pair(even, odd, INTERPRETED)
    if not WHOLE:
        pair = first // 2 + tl.arange(0, 64)[None, :]
        place = packed + at * row + pair * 3
        for byte in tl.static_range(3):
            code = (pairs >> (8 * byte)).to(tl.uint8)
            tl.store(place + byte, code, mask=there & (pair * 2 < width))
    else:  # four pairs of three bytes are three words
        a, b = tl.split(pairs.reshape(GROUPS, 32, 2))
        w0, w2 = tl.split(a.reshape(GROUPS, 16, 2))
        w1, w3 = tl.split(b.reshape(GROUPS, 16, 2))
        a, b, c = w0 | (w1 << 24), (w1 >> 8) | (w2 << 16), (w2 >> 16) | (w3 << 8)
        place = packed + at * (row // 4) + first // 8 * 3
        if WIDE:  # four times three words are three times four
            a0, a1, a2, a3 = _fours(a)
            b0, b1, b2, b3 = _fours(b)
            c0, c1, c2, c3 = _fours(c)
            place += tl.arange(0, 4)[None, :] * 12
            _store_four(place, a0, b0, c0, a1, there)
            _store_four(place + 4, b1, c1, a2, b2, there)
            _store_four(place + 8, c2, a3, b3, c3, there)
        else:
            place += tl.arange(0, 16)[None, :] * 3
            tl.store(place, a, mask=there)
            tl.store(place + 1, b, mask=there)
            tl.store(place + 2, c, mask=there)


@triton.jit
def _fours(x):
    """Return every fourth column, beginning at each of the first four."""
    even, odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    x0, x2 = tl.split(even.reshape(x.shape[0], x.shape[1] // 4, 2))
    x1, x3 = tl.split(odd.reshape(x.shape[0], x.shape[1] // 4, 2))
    return x0, x1, x2, x3


@triton.jit
def _store_four(place, w0, w1, w2, w3, there):
    """Store four words from each place on."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(place.shape[0], place.shape[1], 4)
    at = place[:, :, None] + tl.arange(0, 4)[None, None, :]
    tl.store(at, words, mask=there[:, :, None])


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
def _decode_e5m6_kernel(
    packed, scales, out, width, row, groups, GROUPS: tl.constexpr, WHOLE: tl.constexpr
):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    there, tiles = (group < groups)[:, None], (width + 127) // 128
    at, first = (group // tiles)[:, None].to(tl.int64), (group % tiles * 128)[:, None]
    column = first + tl.arange(0, 128)[None, :]
    inside = there & (column < width)
    if WHOLE:  # three words are four pairs
        place = packed + at * (row // 4) + first // 8 * 3 + tl.arange(0, 16)[None, :] * 3
        a = tl.load(place, mask=there, other=0).to(tl.uint32)
        b = tl.load(place + 1, mask=there, other=0).to(tl.uint32)
        c = tl.load(place + 2, mask=there, other=0).to(tl.uint32)
        w1, w2 = (a >> 24) | (b << 8), (b >> 16) | (c << 16)
        # The parts of a number's place come from the highest to the lowest.
        even = _in_order(a << 4, w1 << 4, w2 << 4, c >> 4)
        odd = _in_order(a >> 8, w1 >> 8, w2 >> 8, c >> 16)
        half = tl.join(even, odd).reshape(GROUPS, 128)
    else:  # a code's twelve bits lie in two neighbouring bytes, an odd one's shifted by four
        byte = packed + at * row + column // 2 * 3 + column % 2
        low = tl.load(byte, mask=inside, other=0).to(tl.uint32)
        high = tl.load(byte + 1, mask=inside, other=0).to(tl.uint32)
        half = ((low | (high << 8)) >> (column % 2 * 4).to(tl.uint32)) << 4
    half = (half & 0xFFF0).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    exponent = tl.load(scales + group, mask=group < groups, other=127).to(tl.int32)
    value = half * (exponent << 23).to(tl.float32, bitcast=True)[:, None]
    tl.store(out + at * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _in_order(w0, w1, w2, w3):
    """Put four tensors side by side, element by element."""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(w0.shape[0], 4 * w0.shape[1])
