"""Symmetric integer weights with a scale a group of inputs, and their packing in 32-bit words.

A weight is ``code * scale`` with a signed code of 8 or 4 bits and a BF16 scale that ``group_size``
neighbouring inputs of one output share. Words hold codes as ``pack-quantized`` checkpoints do: the
first input in the lowest bits, each code raised by half its range so that it is not negative. On a
little-endian machine those bytes are a row-major table of codes as they stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = (4, 8)
WHOLE_ROW = -1
GROUP_SIZE = 128
# Rows whose candidates are compared at a time: the working copies stay in a cache's reach.
_ROWS = 256


class Codes(NamedTuple):
    """A matrix in integers: int8 ``[O, I]``, and BF16 scales ``[O, groups]`` that multiply."""

    codes_OI: Tensor
    scales_OG: Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix as a checkpoint stores it, for kernels that read it without unpacking.

    ``codes`` is uint8: ``[O, I]`` for 8 bits, for 4 bits ``[O, ceil(I / 2)]`` with the even inputs
    in the low halves. A code is ``stored - 2 ** (bits - 1)``. ``scales`` is ``[O, groups]``;
    group ``g`` covers inputs ``g * group_size`` and on, the last one perhaps fewer.
    ``group_size`` is the whole row where there is one scale a row.
    """

    codes: Tensor
    scales: Tensor
    group_size: int
    bits: int
    shape: tuple[int, int]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix ``[O, I]`` in ``dtype``."""
        codes_OI = _unpacked_bytes(self.codes, self.bits, self.shape[1])
        return dequantize(codes_OI, self.scales, self.group_size, dtype)


def groups(width: int, group_size: int) -> int:
    """Return how many groups a row of ``width`` inputs has."""
    return 1 if group_size == WHOLE_ROW else -(-width // group_size)


def group_width(width: int, group_size: int) -> int:
    """Return the inputs of a whole group: the row's width where the row is one group."""
    return width if group_size == WHOLE_ROW else group_size


def quantize(weight_OI: Tensor, bits: int, group_size: int = GROUP_SIZE) -> Codes:
    """Round a matrix to integers; no weight is off by more than half a step of its group.

    What is dequantised in FP32 and quantised again has the same codes and scales. A group of zeros
    has scale 1. Raises ValueError for NaN and infinity, and for bits or sizes that are impossible.
    """
    require_possible(bits, group_size)
    rows, width = weight_OI.shape
    codes_OI = weight_OI.new_empty(rows, width, dtype=torch.int8)
    scales_OG = weight_OI.new_empty(rows, groups(width, group_size), dtype=torch.bfloat16)
    parts = zip(weight_OI.split(_ROWS), codes_OI.split(_ROWS), scales_OG.split(_ROWS), strict=True)
    for weight_oI, codes_oI, scales_oG in parts:
        wide_oI = weight_oI.float()
        scales_oG.copy_(choose_scales(wide_oI, bits, group_size))
        codes_oI.copy_(round_to_codes(wide_oI, spread(scales_oG, width, group_size), bits))
    return Codes(codes_OI, scales_OG)


def dequantize(codes_OI: Tensor, scales_OG: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """Return ``code * scale`` in ``dtype``: the product is exact in FP32 and rounded once."""
    working = torch.promote_types(dtype, torch.float32)
    result_OI = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    parts = zip(codes_OI.split(_ROWS), scales_OG.split(_ROWS), result_OI.split(_ROWS), strict=True)
    for codes_oI, scales_oG, result_oI in parts:
        scales_oI = spread(scales_oG.to(working), codes_OI.shape[1], group_size)
        result_oI.copy_(codes_oI.to(working) * scales_oI)
    return result_OI


def choose_scales(weight_OI: Tensor, bits: int, group_size: int) -> Tensor:
    """Return the BF16 scales ``[O, groups]`` of FP32 rows.

    The largest value of a group may fall on the largest code, on the smallest one, which is one
    step further out, or between. Of the three the one with the least squared error wins, if no
    weight is off by more than half a step; the first always is possible.
    """
    tiles_OGg = _tiles(weight_OI, group_size)
    amax_OG = tiles_OGg.abs().amax(-1)
    if not amax_OG.isfinite().all():
        raise ValueError("holds NaN or infinity, which integers cannot store")
    most = 2 ** (bits - 1) - 1
    candidates = (
        _nearest(amax_OG / most),
        _upward(amax_OG / (most + 0.5)),
        _nearest(amax_OG / (most + 1)),
    )
    best_OG, least_OG = candidates[0], torch.full_like(amax_OG, float("inf"))
    for number, scale_OG in enumerate(candidates):
        steps_OGg = tiles_OGg / scale_OG.unsqueeze(-1)
        off_OGg = (steps_OGg.round().clamp_(-most - 1, most) - steps_OGg).abs_()
        # In units of the largest value, which no square takes out of FP32's range.
        error_OG = off_OGg.square().sum(-1) * (scale_OG / amax_OG).square()
        if number:
            error_OG = error_OG.masked_fill(off_OGg.amax(-1) > 0.5, float("inf"))
        better_OG = error_OG < least_OG
        best_OG = torch.where(better_OG, scale_OG, best_OG)
        least_OG = torch.where(better_OG, error_OG, least_OG)
    return torch.where(amax_OG == 0, 1.0, best_OG).to(torch.bfloat16)


def round_to_codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the nearest codes, in FP32 and not yet integers by dtype."""
    most = 2 ** (bits - 1) - 1
    return (weight / scale.float()).round_().clamp_(-most - 1, most)


def spread(scales_OG: Tensor, width: int, group_size: int) -> Tensor:
    """Return every input's scale, ``[O, I]``."""
    wide = group_width(width, group_size)
    return scales_OG.repeat_interleave(wide, dim=1)[:, :width]


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Return int32 words ``[O, ceil(I * bits / 32)]``; what a last word has no code for is zero."""
    fields = 32 // bits
    padded_OI = F.pad(codes_OI.to(torch.int16) + 2 ** (bits - 1), (0, -codes_OI.shape[1] % fields))
    bytes_OB = padded_OI.to(torch.uint8)
    if bits == 4:
        bytes_OB = bytes_OB[:, ::2] | bytes_OB[:, 1::2] << 4
    return bytes_OB.contiguous().view(torch.int32)


def unpack(words_OW: Tensor, bits: int, width: int) -> Tensor:
    """Return the int8 codes ``[O, width]`` of int32 words."""
    return _unpacked_bytes(stored_bytes(words_OW, bits, width), bits, width)


def stored_bytes(words_OW: Tensor, bits: int, width: int) -> Tensor:
    """Return words as the bytes of ``QuantizedWeight``: a view, no copy."""
    return words_OW.contiguous().view(torch.uint8)[:, : -(-width * bits // 8)]


def require_possible(bits: int, group_size: int) -> None:
    """Raise ValueError for bits and group sizes that there is no format for."""
    if bits not in BITS:
        raise ValueError(f"{bits} bits: integers of {' or '.join(map(str, BITS))} bits are stored")
    if group_size < 1 and group_size != WHOLE_ROW:
        raise ValueError(f"group size {group_size}: use 1 or more, or -1 for one scale a row")


def _unpacked_bytes(bytes_OB: Tensor, bits: int, width: int) -> Tensor:
    if bits == 4:
        bytes_OB = torch.stack((bytes_OB & 15, bytes_OB >> 4), dim=-1).flatten(1)
    # Raised codes fit in a byte and its signed twin holds the difference: 0..255 - 128.
    return (bytes_OB[:, :width].to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _tiles(weight_OI: Tensor, group_size: int) -> Tensor:
    """Cut rows into their groups, ``[O, groups, group]``; zeros fill a ragged last one."""
    wide = group_width(weight_OI.shape[1], group_size)
    return F.pad(weight_OI, (0, -weight_OI.shape[1] % wide)).unflatten(1, (-1, wide))


def _nearest(scale: Tensor) -> Tensor:
    """Round to BF16; a scale below the normal numbers would lose its own precision."""
    return scale.clamp(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16).float()


def _upward(scale: Tensor) -> Tensor:
    """Round to BF16 and not down."""
    near = _nearest(scale)
    return torch.where(near < scale, _nearest(near * (1 + 3 * 2**-9)), near)
