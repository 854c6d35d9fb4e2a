"""E5M6: twelve bits for the output of attention, saved for the backward pass (facts 4.1, 4.4).

The report names the format and its scales, powers of two a tile of 1 x 128, and leaves its bits
open. Ours are the upper twelve of IEEE half precision, as E5M2 are its upper eight:

    bit  11     10 ... 6        5 ... 0       sign, exponent with bias 15, fraction

    exponent 0         2^-14 * fraction / 64                    zeros and subnormals, from 2^-20
    exponent 1 .. 30   2^(exponent - 15) * (1 + fraction / 64)  up to 65024
    exponent 31        infinity and NaN, of which we write NaN

So a code becomes a number by a shift of four bits, and BF16 holds every decoded number exactly. The
scale is the smallest power of two with which a tile's largest magnitude is at most 65024, in one
byte (UE8M0: ``2^(byte - 127)``, 255 for NaN): the largest number lies in the upper half of what the
codes reach.

Two codes lie in three bytes, little-endian: the first in bits 0 to 11, the second in bits 12 to 23.
A tile with a number that is not finite becomes NaN as a whole, as in ``quantize.py``.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.kernels.cpu.library import Library
from ziphius.kernels.quantize import SMALLEST_AMAX, TILE, rows_of, tile_count

LARGEST = 65024.0
_SMALLEST_NORMAL = 2.0**-14
# FP32 has 17 fraction bits more. It has no room for them beside 1.5 * 2^17 times a number's binade.
_ROUNDING = 1.5 * 2.0**17
_EXPONENT_BITS = 0x7F800000
# Added to FP32 bits, it raises the exponent where the fraction is above 63/64.
_ABOVE_LARGEST = 0x1FFFF


class E5M6(NamedTuple):
    """Numbers in twelve bits, for a width that the caller remembers.

    ``packed`` is uint8 ``[..., ceil(C / 2) * 3]``, ``scales`` uint8 ``[..., ceil(C / 128)]``.
    """

    packed: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.packed.nbytes + self.scales.nbytes


class Version(Protocol):
    """A version of this file's functions."""

    def encode(self, x: Tensor) -> E5M6:
        """Do what the function ``encode`` does."""
        ...

    def decode(self, q: E5M6, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Do what the function ``decode`` does."""
        ...


class TorchE5M6:
    """The functions below."""

    def encode(self, x: Tensor) -> E5M6:
        """Do what the function ``encode`` does."""
        return encode(x)

    def decode(self, q: E5M6, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Do what the function ``decode`` does."""
        return decode(q, width, dtype)


def encode(x: Tensor) -> E5M6:
    """Round ``x`` ``[..., C]``, in any float dtype, to E5M6: to nearest, ties to even.

    Numbers down to 2^-28 of their tile's largest are off by at most 2^-7 of themselves, smaller
    ones by 2^-35 of the tile's largest, or by 2^-50 where that one is below 1e-4.
    """
    wide = x.detach().float()
    width = wide.shape[-1]
    tiles = F.pad(wide, (0, -width % TILE)).unflatten(-1, (-1, TILE))
    exponents = _exponents(tiles.abs().amax(-1))
    # An exponent of 255 makes this an infinity, and every code of its tile NaN.
    inverse = ((254 - exponents) << 23).view(torch.float32)
    rounded = _rounded(tiles * inverse.unsqueeze(-1)).flatten(-2)[..., : width + width % 2]
    return E5M6(_pack(rounded), exponents.to(torch.uint8))


def decode(q: E5M6, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers ``[..., width]``: exact, but for dtypes that cannot hold them."""
    halves = F.pad(_unpack(q.packed), (0, -width % TILE - width % 2)).unflatten(-1, (-1, TILE))
    scales = (q.scales.int() << 23).view(torch.float32)
    working = torch.promote_types(dtype, torch.float32)
    return (halves.to(working) * scales.unsqueeze(-1)).flatten(-2)[..., :width].to(dtype)


def _exponents(amax: Tensor) -> Tensor:
    """Return the scales of tiles as exponents of FP32, int32."""
    bits = amax.clamp(min=SMALLEST_AMAX).view(torch.int32)
    exponents = ((bits + _ABOVE_LARGEST) >> 23) - 15
    return torch.where(amax.isfinite(), exponents, 255)


def _rounded(scaled: Tensor) -> Tensor:
    """Round FP32 numbers up to 65024 to E5M6, held in half precision: its last four bits are zero.

    Adding a much larger number leaves no place for the bits to drop, so the adder rounds: to
    nearest, ties to even. Infinity becomes NaN.
    """
    binades = (scaled.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    larger = binades.clamp_(min=_SMALLEST_NORMAL).mul_(_ROUNDING)
    return torch.add(scaled, larger).sub_(larger).copysign_(scaled).to(torch.float16)


def _pack(rounded: Tensor) -> Tensor:
    """Put pairs of E5M6 numbers in half precision ``[..., C]``, C even, into three bytes each."""
    pairs = rounded.contiguous().view(torch.int32)
    words = (pairs >> 4).bitwise_and_(0xFFF)
    words |= (pairs >> 8).bitwise_and_(0xFFF000)
    return words.view(torch.uint8).unflatten(-1, (-1, 4))[..., :3].flatten(-2)


def _unpack(packed: Tensor) -> Tensor:
    """Return the numbers of three bytes a pair, in half precision ``[..., C]``."""
    words = F.pad(packed.unflatten(-1, (-1, 3)), (0, 1)).view(torch.int32)
    pairs = (words >> 12).bitwise_left_shift_(20)
    pairs |= words.bitwise_and_(0xFFF).bitwise_left_shift_(4)
    return pairs.view(torch.float16).flatten(-2)


def encode_compiled(library: Library, x: Tensor) -> E5M6:
    """Do what ``encode`` does, to the bit."""
    x_MC = rows_of(x.detach())
    shape, width = x.shape[:-1], x.shape[-1]
    packed = x_MC.new_empty(*shape, (width + 1) // 2 * 3, dtype=torch.uint8)
    scales = x_MC.new_empty(*shape, tile_count(width), dtype=torch.uint8)
    library.call("e5m6_encode", x_MC.dtype, x_MC, x_MC.stride(0), packed, scales, *x_MC.shape)
    return E5M6(packed, scales)


def decode_compiled(
    library: Library, q: E5M6, width: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Do what ``decode`` does, to the bit but for the sign of NaN; other dtypes are left to it."""
    if dtype not in (torch.float32, torch.bfloat16):
        return decode(q, width, dtype)
    packed, scales = q.packed.contiguous(), q.scales.contiguous()
    out = torch.empty(*packed.shape[:-1], width, dtype=dtype)
    rows = out.numel() // max(width, 1)
    library.call("e5m6_decode", dtype, packed, scales, out, rows, width)
    return out


class CompiledE5M6:
    """The compiled functions."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def encode(self, x: Tensor) -> E5M6:
        """Do what the function ``encode`` does."""
        return encode_compiled(self.library, x)

    def decode(self, q: E5M6, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Do what the function ``decode`` does."""
        return decode_compiled(self.library, q, width, dtype)


VERSIONS: dict[str, type[Version]] = {"torch": TorchE5M6}
COMPILED = CompiledE5M6
