"""E5M6 on a GPU: the bits of ``kernels/e5m6.py``, every number read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.e5m6 import E5M6
from ziphius.kernels.quantize import TILE, tile_count
from ziphius.kernels.triton.bits import magnitude
from ziphius.kernels.triton.quantize import rows_of

GROUPS = 16  # tiles a program takes
COLUMNS = 1024  # numbers of a row that a program decodes


class TritonE5M6:
    """What ``TorchE5M6`` does. Rows of an input may lie apart; its last dimension may not."""

    def encode(self, x: Tensor) -> E5M6:
        """Do what the function ``encode`` does."""
        x_MC, width = rows_of(x), x.shape[-1]
        row = -(-width // 2) * 3
        packed = torch.empty(*x.shape[:-1], row, dtype=torch.uint8, device=x.device)
        scales = torch.empty(*x.shape[:-1], tile_count(width), dtype=torch.uint8, device=x.device)
        groups = scales.numel()
        if groups and x.numel():
            whole = width % TILE == 0
            where = packed.view(torch.int32) if whole else packed
            _encode_e5m6_kernel[(triton.cdiv(groups, GROUPS),)](
                *(x_MC, where, scales, x_MC.stride(0), width, row, groups),
                GROUPS=GROUPS,
                WHOLE=whole,
            )
        return E5M6(packed, scales)

    def decode(self, q: E5M6, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Do what the function ``decode`` does."""
        out = torch.empty(*q.packed.shape[:-1], width, dtype=dtype, device=q.packed.device)
        rows = out.numel() // max(1, width)
        if out.numel():
            grid = (rows, triton.cdiv(width, COLUMNS))
            row, tiles = q.packed.shape[-1], q.scales.shape[-1]
            _decode_e5m6_kernel[grid](q.packed, q.scales, out, width, row, tiles, COLUMNS=COLUMNS)
        return out


@triton.jit
def _encode_e5m6_kernel(
    x, packed, scales, stride, width, row, groups, GROUPS: tl.constexpr, WHOLE: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    tiles = (width + 127) // 128
    at, first = group // tiles, (group % tiles) * 128
    column = first[:, None] + tl.arange(0, 128)[None, :]
    inside = (group < groups)[:, None] & (column < width)
    values = tl.load(x + at[:, None] * stride + column, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(magnitude(values), axis=1)
    finite = largest < 0x7F800000
    exponent = ((tl.maximum(largest, 0x38D1B717) + 0x1FFFF) >> 23) - 15  # of 1e-4 and more
    exponent = tl.where(finite, exponent, 255)
    tl.store(scales + group, exponent.to(tl.uint8), mask=group < groups)
    inverse = tl.where(finite, (254 - exponent) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    codes = _round(values * inverse[:, None])
    even, odd = tl.split(codes.reshape(GROUPS, 64, 2))
    word = even | (odd << 12)
    if WHOLE:  # four words of three bytes are three of four
        a, b = tl.split(word.reshape(GROUPS, 32, 2))
        w0, w2 = tl.split(a.reshape(GROUPS, 16, 2))
        w1, w3 = tl.split(b.reshape(GROUPS, 16, 2))
        place = (at * row + first // 2 * 3)[:, None] // 4 + tl.arange(0, 16)[None, :] * 3
        there = (group < groups)[:, None] & (tl.arange(0, 16)[None, :] >= 0)
        tl.store(packed + place, w0 | (w1 << 24), mask=there)
        tl.store(packed + place + 1, ((w1 >> 8) & 0xFFFF) | (w2 << 16), mask=there)
        tl.store(packed + place + 2, ((w2 >> 16) & 0xFF) | (w3 << 8), mask=there)
    else:
        pair = first[:, None] // 2 + tl.arange(0, 64)[None, :]
        place = at[:, None] * row + pair * 3
        there = (group < groups)[:, None] & (pair * 2 < width)
        for byte in tl.static_range(3):
            tl.store(packed + place + byte, (word >> (8 * byte)).to(tl.uint8), mask=there)


@triton.jit
def _round(x: tl.tensor) -> tl.tensor:
    """Round FP32 numbers up to 65024 to codes of twelve bits, to nearest even; int32."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Six bits of mantissa stay of 23; the exponent's bias goes from 127 to 15.
    normal = ((size + 0xFFFF + ((size >> 17) & 1)) >> 17) - (112 << 6)
    # 8 has the last place of a subnormal code, 2^-20: adding it rounds.
    shifted = size.to(tl.float32, bitcast=True) + 8.0
    small = shifted.to(tl.int32, bitcast=True) - 0x41000000
    code = tl.where(size < 0x38800000, small, normal)
    code = tl.where(size >= 0x7F800000, 0x7E0, code)
    return code | ((bits >> 20) & 0x800)


@triton.jit
def _decode_e5m6_kernel(packed, scales, out, width, row, tiles, COLUMNS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    # A code's twelve bits lie in two neighbouring bytes, an odd one's shifted by four.
    byte = packed + at * row + column // 2 * 3 + column % 2
    low = tl.load(byte, mask=inside, other=0).to(tl.int32)
    high = tl.load(byte + 1, mask=inside, other=0).to(tl.int32)
    code = ((low | (high << 8)) >> (column % 2 * 4)) & 0xFFF
    half = (code << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    exponent = tl.load(scales + at * tiles + column // 128, mask=inside, other=127).to(tl.int32)
    value = half * (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(out + at * width + column, value.to(out.dtype.element_ty), mask=inside)
