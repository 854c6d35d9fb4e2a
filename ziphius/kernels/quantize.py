"""FP8 in small groups: E4M3 codes with a scale for every tile or block (facts 4.2).

Activations and gradients are quantised in tiles of one row by 128 columns, weights in blocks of
128 x 128, each from its own largest value at that moment (report section 3.3.2). The weight
gradient sums over tokens, so it needs groups along them: both of its operands are *turned*, that is
transposed and grouped anew. A turned matrix again has tiles of one row, and every product is
``A B^T`` of two matrices whose groups run along the dimension that is summed.

A group of numbers that are not finite becomes NaN as a whole: it must be seen, not saturated. No
finite number is out of the codes' range, because the scale comes from the largest one.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.kernels.cpu.library import Library

TILE = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# A group of zeros would have the scale zero: the released code keeps amax away from it.
SMALLEST_AMAX = 1e-4


class Fp8(NamedTuple):
    """A matrix, or a stack of them, in FP8.

    ``codes`` is float8_e4m3fn ``[..., R, C]``; ``scales`` is float32 and multiplies:
    ``[..., ceil(R / rows), ceil(C / 128)]``. ``rows`` share a scale: 1 in tiles, 128 in blocks.
    """

    codes: Tensor
    scales: Tensor
    rows: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def tile_count(width: int) -> int:
    """Return how many groups ``width`` numbers make, the last one perhaps of fewer than 128."""
    return -(-width // TILE)


def scales_of(amax: Tensor, *, power_of_two: bool) -> Tensor:
    """Return the scales of groups by their largest magnitudes, FP32 (facts 4.2).

    ``max(amax, 1e-4) / 448``; with ``power_of_two`` the next power of two that is not smaller
    (UE8M0). NaN and infinity give a scale that is not finite.
    """
    # A GPU divides by a number of the host by multiplying, which is another rounding.
    largest = amax.new_full((), E4M3_MAX, dtype=torch.float32)
    scales = amax.float().clamp(min=SMALLEST_AMAX) / largest
    if not power_of_two:
        return scales
    # Of a normal number: where a bit of the mantissa is set, the next exponent.
    bits = scales.view(torch.int32)
    raised = (bits + 0x7FFFFF) & 0x7F800000
    return torch.where(scales.isfinite(), raised.view(torch.float32), scales)


def quantize_tiles(x: Tensor, *, power_of_two: bool = False) -> Fp8:
    """Quantise in tiles of one row by 128 columns. ``x`` is ``[..., C]`` in any float dtype.

    ``codes = e4m3(x / scale)``, to nearest even. Columns that are missing from the last tile count
    as zeros.
    """
    wide = x.float()
    width = wide.shape[-1]
    tiles = F.pad(wide, (0, -width % TILE)).unflatten(-1, (-1, TILE))
    scales = scales_of(tiles.abs().amax(-1), power_of_two=power_of_two)
    codes = (tiles / scales.unsqueeze(-1)).flatten(-2)[..., :width].to(E4M3)
    return Fp8(codes.contiguous(), scales)


def quantize_blocks(weight: Tensor, *, power_of_two: bool = False) -> Fp8:
    """Quantise in blocks of 128 x 128. ``weight`` is ``[..., O, I]`` in any float dtype.

    What a ragged edge lacks counts as zeros.
    """
    wide = weight.float()
    O, I = wide.shape[-2:]  # noqa: E741
    padded = F.pad(wide, (0, -I % TILE, 0, -O % TILE))
    blocks = padded.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))
    scales = scales_of(blocks.abs().amax((-3, -1)), power_of_two=power_of_two)
    codes = (blocks / scales[..., :, None, :, None]).flatten(-4, -3).flatten(-2)
    return Fp8(codes[..., :O, :I].to(E4M3).contiguous(), scales, TILE)


def dequantize(q: Fp8, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``code * scale``, computed in at least FP32 and rounded once to ``dtype``."""
    working = torch.promote_types(dtype, torch.float32)
    rows, width = q.codes.shape[-2:]
    scales = q.scales.to(working).repeat_interleave(TILE, -1)[..., :width]
    if q.rows > 1:
        scales = scales.repeat_interleave(q.rows, -2)[..., :rows, :]
    return (q.codes.to(working) * scales).to(dtype)


def transpose_blocks(q: Fp8) -> Fp8:
    """Transpose a matrix in blocks: the same numbers and scales, no rounding."""
    return Fp8(
        q.codes.transpose(-1, -2).contiguous(), q.scales.transpose(-1, -2).contiguous(), q.rows
    )


def turned_width(rows: int, segments: int) -> int:
    """Return the columns of a turned matrix of ``rows`` rows in ``segments`` segments.

    Whatever their lengths, each can begin at a multiple of 128.
    """
    return tile_count(rows) * TILE if segments == 1 else (rows // TILE + segments) * TILE


def segment_starts(counts_E: Tensor) -> Tensor:
    """Return the columns at which segments of ``counts`` rows begin when turned: int64 ``[E]``."""
    padded_E = (counts_E + TILE - 1) // TILE * TILE
    return padded_E.cumsum(0) - padded_E


def turn(x_MC: Tensor, counts_E: Tensor | None = None, *, power_of_two: bool = False) -> Fp8:
    """Transpose ``[M, C]`` and quantise in tiles of 128 tokens a channel (128 x 1, facts 4.2).

    With ``counts``, int64 ``[E]``, rows come in segments, whose groups begin anew: segment ``e``
    starts at column ``segment_starts(counts)[e]``. The result is ``[C, turned_width(M, E)]``; what
    no row fills is zero.
    """
    segments = 1 if counts_E is None else len(counts_E)
    width = turned_width(len(x_MC), segments)
    if counts_E is None:
        turned_CM = F.pad(x_MC.float().T, (0, width - len(x_MC)))
    else:
        turned_CM = x_MC.new_zeros(x_MC.shape[1], width, dtype=torch.float32)
        starts = segment_starts(counts_E).tolist()
        for start, segment in zip(starts, x_MC.split(counts_E.tolist()), strict=True):
            turned_CM[:, start : start + len(segment)] = segment.T
    return quantize_tiles(turned_CM, power_of_two=power_of_two)


def regroup(q: Fp8, counts_E: Tensor | None = None, *, power_of_two: bool = False) -> Fp8:
    """Turn a matrix in tiles: dequantise, transpose, quantise along the rows (facts 4.2).

    With scales that are powers of two both times, a code changes only where its new group has a
    larger scale.
    """
    return turn(dequantize(q), counts_E, power_of_two=power_of_two)


class Quantize(Protocol):
    """The quantisers of a layer, each in as few readings of its input as the version can."""

    def tiles(self, x: Tensor, *, power_of_two: bool = False) -> Fp8:
        """Do what ``quantize_tiles`` does."""
        ...

    def turn(
        self, x_MC: Tensor, counts_E: Tensor | None = None, *, power_of_two: bool = False
    ) -> Fp8:
        """Do what the function ``turn`` does."""
        ...

    def regroup(self, q: Fp8, counts_E: Tensor | None = None, *, power_of_two: bool = False) -> Fp8:
        """Do what the function ``regroup`` does."""
        ...

    def both(
        self, x_MC: Tensor, counts_E: Tensor | None = None, *, power_of_two: bool = False
    ) -> tuple[Fp8, Fp8]:
        """Return ``x`` in tiles, and turned: both operands that a gradient is."""
        ...

    def blocks(self, weight: Tensor, *, power_of_two: bool = False) -> tuple[Fp8, Fp8]:
        """Return a weight, or a stack of them, in blocks, and its transpose."""
        ...


class TorchQuantize:
    """The functions above: what every other version is measured against."""

    def tiles(self, x: Tensor, *, power_of_two: bool = False) -> Fp8:
        """Do what ``quantize_tiles`` does."""
        return quantize_tiles(x, power_of_two=power_of_two)

    def turn(
        self, x_MC: Tensor, counts_E: Tensor | None = None, *, power_of_two: bool = False
    ) -> Fp8:
        """Do what the function ``turn`` does."""
        return turn(x_MC, counts_E, power_of_two=power_of_two)

    def regroup(self, q: Fp8, counts_E: Tensor | None = None, *, power_of_two: bool = False) -> Fp8:
        """Do what the function ``regroup`` does."""
        return regroup(q, counts_E, power_of_two=power_of_two)

    def both(
        self, x_MC: Tensor, counts_E: Tensor | None = None, *, power_of_two: bool = False
    ) -> tuple[Fp8, Fp8]:
        """Return ``x`` in tiles, and turned: both operands that a gradient is."""
        tiles = self.tiles(x_MC, power_of_two=power_of_two)
        return tiles, self.turn(x_MC, counts_E, power_of_two=power_of_two)

    def blocks(self, weight: Tensor, *, power_of_two: bool = False) -> tuple[Fp8, Fp8]:
        """Return a weight, or a stack of them, in blocks, and its transpose."""
        q = quantize_blocks(weight, power_of_two=power_of_two)
        return q, transpose_blocks(q)


class CompiledQuantize:
    """The same quantisers in C++: codes and scales equal the reference's to the bit.

    What is not finite is marked by the same groups; the sign of a NaN may differ.
    """

    def __init__(self, library: Library) -> None:
        self._library = library

    def tiles(self, x: Tensor, *, power_of_two: bool = False) -> Fp8:
        """Do what ``quantize_tiles`` does."""
        x_MC = rows_of(x)
        tiles = empty_tiles(x_MC, *x_MC.shape)
        self._rows(x_MC, tiles, None, None, power_of_two=power_of_two)
        groups = tiles.scales.shape[1]
        return Fp8(tiles.codes.view(x.shape), tiles.scales.view(*x.shape[:-1], groups))

    def turn(
        self, x_MC: Tensor, counts_E: Tensor | None = None, *, power_of_two: bool = False
    ) -> Fp8:
        """Do what the function ``turn`` does."""
        x_MC = rows_of(x_MC)
        turned = empty_turned(x_MC, counts_E)
        self._rows(x_MC, None, turned, counts_E, power_of_two=power_of_two)
        return turned

    def both(
        self, x_MC: Tensor, counts_E: Tensor | None = None, *, power_of_two: bool = False
    ) -> tuple[Fp8, Fp8]:
        """Return what ``tiles`` and ``turn`` do, from one reading of ``x``."""
        x_MC = rows_of(x_MC)
        tiles, turned = empty_tiles(x_MC, *x_MC.shape), empty_turned(x_MC, counts_E)
        self._rows(x_MC, tiles, turned, counts_E, power_of_two=power_of_two)
        return tiles, turned

    def regroup(self, q: Fp8, counts_E: Tensor | None = None, *, power_of_two: bool = False) -> Fp8:
        """Do what the function ``regroup`` does, of a matrix in tiles."""
        codes_MC, scales = q.codes.contiguous(), q.scales.contiguous()
        turned = empty_turned(codes_MC, counts_E)
        how = (*segments_of(counts_E), int(power_of_two), *codes_MC.shape)
        tensors = (codes_MC, scales, turned.codes, turned.scales, turned.codes.shape[1])
        self._library.call("quantize_regroup", torch.float32, *tensors, *how)
        return turned

    def blocks(self, weight: Tensor, *, power_of_two: bool = False) -> tuple[Fp8, Fp8]:
        """Return ``quantize_blocks(weight)`` and its ``transpose_blocks``, made together."""
        weight = _known(weight).contiguous()
        *experts, O, I = weight.shape  # noqa: E741
        blocks, turned = (
            empty_tiles(weight, O, I, *experts, rows=TILE),
            empty_tiles(weight, I, O, *experts, rows=TILE),
        )
        sizes = (int(power_of_two), *(experts or [1]), O, I)
        self._library.call(
            "quantize_blocks", weight.dtype, weight, *blocks[:2], *turned[:2], *sizes
        )
        return blocks, turned

    def _rows(
        self,
        x_MC: Tensor,
        tiles: Fp8 | None,
        turned: Fp8 | None,
        counts_E: Tensor | None,
        *,
        power_of_two: bool,
    ) -> None:
        width = turned.codes.shape[1] if turned else 0
        targets = (*(tiles or (None, None))[:2], *(turned or (None, None))[:2], width)
        how = (*segments_of(counts_E), int(power_of_two), *x_MC.shape)
        self._library.call("quantize_rows", x_MC.dtype, x_MC, x_MC.stride(0), *targets, *how)


def segments_of(counts_E: Tensor | None) -> tuple[Tensor | None, int]:
    """Return segments as compiled kernels take them: their int64 lengths, and how many."""
    return (None, 1) if counts_E is None else (counts_E.long().contiguous(), len(counts_E))


def _known(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.bfloat16, torch.float32) else x.float()


def rows_of(x: Tensor) -> Tensor:
    """View ``x`` as rows, in a known dtype, whose own numbers lie side by side, or copy it."""
    x_MC = _known(x).reshape(-1, x.shape[-1])
    return x_MC if x_MC.stride(-1) == 1 else x_MC.contiguous()


def empty_tiles(like: Tensor, R: int, C: int, *stack: int, rows: int = 1) -> Fp8:
    """Return memory for a matrix ``[R, C]`` in tiles or blocks, or a stack of such, undefined."""
    codes = like.new_empty(*stack, R, C, dtype=E4M3)
    scales = like.new_empty(*stack, -(-R // rows), tile_count(C), dtype=torch.float32)
    return Fp8(codes, scales, rows)


def empty_turned(x_MC: Tensor, counts_E: Tensor | None) -> Fp8:
    """Return memory for ``x`` turned, undefined."""
    segments = 1 if counts_E is None else len(counts_E)
    M, C = x_MC.shape
    return empty_tiles(x_MC, C, turned_width(M, segments))


VERSIONS: dict[str, type[Quantize]] = {"torch": TorchQuantize}
COMPILED = CompiledQuantize
