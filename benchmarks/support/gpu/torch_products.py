"""torch's own products of the same matrices: BF16, and FP8 by each recipe that a GPU may have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.gpu.entry import Place, Version
from ziphius.kernels.quantize import E4M3, E4M3_MAX, Fp8, dequantize

BF16 = "torch BF16"
BLOCKS = "scaled_mm 1x128, 128x128"
ROWS = "scaled_mm row-wise"
GROUPED_ROWS = "scaled_grouped_mm row-wise"
# Another quantisation of the same numbers, or BF16 in place of codes with scales.
_REQUANTISED, _ROUNDED = 0.1, 2e-2


def dense(place: Place) -> Sequence[Version]:
    """Return what multiplies ``a`` by ``b``: BF16 anywhere, FP8 on GPUs."""
    bf16 = Version(BF16, lambda ab: ab[0] @ ab[1].T, _in_bf16, _ROUNDED)
    if place.device.type != "cuda":
        return (bf16,)
    return (
        bf16,
        Version(BLOCKS, _scaled("BlockWise1x128", "BlockWise128x128"), blocks_for_torch, _ROUNDED),
        Version(ROWS, _scaled("RowWise", "RowWise", fast=True), rows_for_torch, _REQUANTISED),
    )


def _in_bf16(x: Any) -> tuple[Tensor, Tensor]:
    return dequantize(x.a, torch.bfloat16), dequantize(x.b, torch.bfloat16)


def blocks_for_torch(x: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay the same codes and scales out as torch wants them on Hopper.

    Scales of ``a`` column by column; those of ``b`` turned, with their groups padded to a multiple
    of four, and rows of ``b`` to whole blocks. torch wants ``M`` a multiple of four.
    """
    scales_MG = x.a.scales.T.contiguous().T
    scales_oG = F.pad(x.b.scales, (0, -x.b.scales.shape[1] % 4))
    # Padding is not there for FP8 on every machine; for bytes it is.
    b_NK = F.pad(x.b.codes.view(torch.uint8), (0, 0, 0, -len(x.b.codes) % 128)).view(E4M3)
    return x.a.codes, b_NK.T, scales_MG, scales_oG.T


def rows_for_torch(x: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise both anew, with a scale a row."""
    (a, a_scale_M1), (b, b_scale_N1) = (_by_rows(dequantize(q)) for q in (x.a, x.b))
    return a, b.T, a_scale_M1, b_scale_N1.T


def _by_rows(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise with a scale a row: codes, and scales ``[..., R, 1]``."""
    scale_R1 = x_RC.abs().amax(-1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return (x_RC / scale_R1).to(E4M3), scale_R1


def _scaled(recipe_a: str, recipe_b: str, *, fast: bool = False) -> Any:
    def run(x: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        a, b, scale_a, scale_b = x
        kinds = F.ScalingType
        return F.scaled_mm(
            a,
            b,
            scale_a,
            getattr(kinds, recipe_a),
            scale_b,
            getattr(kinds, recipe_b),
            output_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )

    return run


def contiguous(place: Place) -> Sequence[Version]:
    """Return torch's products of segments of rows, for GPUs."""
    if place.device.type != "cuda":
        return ()

    def prepare(x: Any) -> tuple[Tensor, Tensor, Tensor]:
        return *_in_bf16(x), ends(x.counts_E)

    return (
        Version(BF16, _grouped, prepare, _ROUNDED),
        Version(GROUPED_ROWS, _grouped_scaled, grouped_rows_for_torch, _REQUANTISED),
    )


def masked(place: Place, counts: Sequence[int]) -> Sequence[Version]:
    """Return the same for segments with room: the rows that count are brought together first."""
    if place.device.type != "cuda":
        return ()

    def together(x: Any) -> Any:
        def rows(y_EMC: Tensor) -> Tensor:
            return torch.cat([y[:count] for y, count in zip(y_EMC, counts, strict=True)])

        return x._replace(a=Fp8(rows(x.a.codes), rows(x.a.scales)))

    def plain(x: Any) -> tuple[Tensor, Tensor, Tensor]:
        return *_in_bf16(together(x)), ends(x.counts_E)

    def scaled(x: Any) -> tuple[Tensor, ...]:
        return grouped_rows_for_torch(together(x))

    return (
        Version(BF16, _grouped, plain, _ROUNDED),
        Version(GROUPED_ROWS, _grouped_scaled, scaled, _REQUANTISED),
    )


def along_k(place: Place) -> Sequence[Version]:
    """Return the gradients of experts' weights from rows in BF16, for GPUs."""
    if place.device.type != "cuda":
        return ()

    def prepare(x: Any) -> tuple[Tensor, Tensor, Tensor]:
        return x.dy_MN.bfloat16(), x.x_MK.bfloat16(), ends(x.counts_E)

    def run(x: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        dy_MN, x_MK, ends_E = x
        return F.grouped_mm(dy_MN.T, x_MK, offs=ends_E)

    # FP8 rounds both operands: the two results differ by that.
    return (Version(BF16, run, prepare, _REQUANTISED),)


def ends(counts_E: Tensor) -> Tensor:
    """Return the row after the last one of every segment, as torch wants it: int32 ``[E]``."""
    return counts_E.cumsum(0).to(torch.int32)


def grouped_rows_for_torch(x: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantise rows and experts' rows anew, with a scale a row."""
    (a, a_scale_M1), (b, b_scale_EN1) = (_by_rows(dequantize(q)) for q in (x.a, x.b))
    scales = a_scale_M1.squeeze(-1), b_scale_EN1.squeeze(-1).contiguous()
    return a, b.transpose(-1, -2), *scales, ends(x.counts_E)


def _grouped(x: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    a_MK, b_ENK, ends_E = x
    return F.grouped_mm(a_MK, b_ENK.transpose(-1, -2), offs=ends_E)


def _grouped_scaled(x: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    a, b, scale_a, scale_b, ends_E = x
    rows = F.ScalingType.RowWise
    return F.scaled_grouped_mm(
        a,
        b,
        scale_a,
        rows,
        scale_b,
        rows,
        offs=ends_E,
        output_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
