"""FP8 products of experts on a GPU: ``kernels/grouped_gemm.py`` says what they are.

Counts stay on the device: a small kernel writes which rows each tile has, and grids are bounded by
what counts can be. ``spared`` is as in ``gemm_triton``.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ziphius.kernels.quantize import TILE, Fp8
from ziphius.kernels.triton.gemm import PAIRS, TILES_CANDIDATES, available, best_large, run
from ziphius.kernels.triton.product import Config, Shape
from ziphius.kernels.triton.tiles import ALONG_K, ROWS, groups_of_segments, tiles_of_rows

CANDIDATES = (
    Config("hopper", 192, 128, stages=4),
    PAIRS,
    Config("plain", 128, 128, stages=4, warps=8),
    Config("plain", 64, 128, stages=4),
)
# Rows an expert below which a tile of 128 would be mostly empty.
_FEW_ROWS = 64


def grouped_gemm_triton(
    a: Fp8, b: Fp8, counts_E: Tensor, dtype: torch.dtype, *,
    config: Config | None = None, spared: int = 0,
) -> Tensor:  # fmt: skip
    """Do what ``grouped_gemm_reference`` does. ``config`` replaces the choice, for a benchmark."""
    M, experts, N = len(a.codes), len(counts_E), b.codes.shape[1]
    out_MN = torch.empty(M, N, dtype=dtype, device=a.codes.device)
    chosen = available(config or rows_config(M, N, experts), a, b)
    bound = M // chosen.block_m + min(experts, M)
    _by_rows(a, b, counts_E, out_MN, chosen, bound, 0, spared)
    return out_MN


def masked_gemm_triton(
    a: Fp8, b: Fp8, counts_E: Tensor, dtype: torch.dtype, *,
    config: Config | None = None, spared: int = 0,
) -> Tensor:  # fmt: skip
    """Do what ``masked_gemm_reference`` does. ``config`` replaces the choice, for a benchmark."""
    experts, M, _ = a.codes.shape
    N = b.codes.shape[1]
    out_EMN = torch.empty(experts, M, N, dtype=dtype, device=a.codes.device)
    chosen = available(config or rows_config(experts * M, N, experts), a, b)
    bound = experts * triton.cdiv(M, chosen.block_m)
    _by_rows(a, b, counts_E, out_EMN, chosen, bound, M, spared)
    return out_EMN


def grouped_gemm_along_k_triton(
    a: Fp8, b: Fp8, counts_E: Tensor, dtype: torch.dtype, *,
    config: Config | None = None, spared: int = 0,
) -> Tensor:  # fmt: skip
    """Do what ``grouped_gemm_along_k_reference`` does.

    Codes that no row of a segment fills must be zero, as ``quantize.turn`` leaves them.
    """
    (N, S), K, experts = a.codes.shape, len(b.codes), len(counts_E)
    out_ENK = torch.empty(experts, N, K, dtype=dtype, device=a.codes.device)
    if not S:
        return out_ENK.zero_()
    if out_ENK.numel():
        chosen = available(config or TILES_CANDIDATES[0], a, b)
        shape = Shape(N, K, S, a.scales.shape[-1], experts)
        table = groups_of_segments(counts_E)
        row_tiles = triton.cdiv(N, chosen.block_m)
        way = (a, b, out_ENK, shape, ALONG_K.value, chosen, table)
        run(*way, row_tiles=row_tiles, spared=spared)
    return out_ENK


def rows_config(M: int, N: int, experts: int) -> Config:
    """Pick how ``M`` rows of ``experts`` segments are cut, which are taken for equally long."""
    each = triton.cdiv(M, max(experts, 1))
    if each <= _FEW_ROWS:
        return Config("plain", 64, 128, stages=4)
    return best_large(each, N, TILE, experts)


def _by_rows(
    a: Fp8, b: Fp8, counts_E: Tensor, out: Tensor, chosen: Config, bound: int, stride: int,
    spared: int,
) -> None:  # fmt: skip
    K = a.codes.shape[-1]
    if out.numel() and K:
        rows = out.numel() // out.shape[-1]
        shape = Shape(rows, out.shape[-1], K, a.scales.shape[-1], len(counts_E))
        table, total = tiles_of_rows(counts_E, bound, chosen.block_m, stride)
        way = (a, b, out, shape, ROWS.value, chosen, table, total)
        run(*way, row_tiles=bound, spared=spared)
    elif not K:
        out.zero_()
