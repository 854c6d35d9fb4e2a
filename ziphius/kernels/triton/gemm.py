"""The FP8 product ``A B^T`` on a GPU: ``kernels/gemm.py`` says what it is."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ziphius.kernels.quantize import Fp8
from ziphius.kernels.triton import bits, product
from ziphius.kernels.triton.product import Config, Shape
from ziphius.kernels.triton.tiles import DENSE

# What a benchmark sweeps; `config` picks among them.
CANDIDATES = (
    Config("hopper", 128, 128, stages=6),
    Config("hopper", 192, 128, stages=4),
    Config("hopper", 256, 128, stages=4),
    Config("plain", 128, 128, stages=4, warps=8),
    Config("plain", 128, 128, stages=4, warps=8, copies=False),
    Config("plain", 128, 64, stages=6),
    Config("plain", 64, 128, stages=3),
    Config("plain", 64, 128, stages=4),
    Config("plain", 64, 128, stages=8),
    Config("plain", 64, 128, stages=4, splits=2),
    Config("plain", 64, 128, stages=4, splits=4),
    Config("plain", 64, 64, stages=6),
    Config("plain", 64, 64, stages=6, splits=2),
    Config("plain", 64, 64, stages=6, splits=4),
    Config("plain", 64, 32, stages=8),
)
# Tiles of how many rows the Hopper kernel has, and what 128 of K cost: cycles of shared memory.
# Those of 256 rows (1152) keep some sums outside registers; a benchmark may say that they pay.
_HEIGHTS = ((128, 640), (192, 896))
_MULTIPROCESSORS = 132
# Below, a product waits for memory, and more programs must ask for it at one time.
_FEW_ROWS = 128
_HOPPER = 9


def gemm_triton(a: Fp8, b: Fp8, dtype: torch.dtype, *, config: Config | None = None) -> Tensor:
    """Do what ``gemm_reference`` does. ``config`` replaces the choice, for a benchmark.

    Sums of 128 products are the tensor cores', which keep about 14 bits of them.
    """
    (M, K), N = a.codes.shape, b.codes.shape[0]
    out_MN = torch.empty(M, N, dtype=dtype, device=a.codes.device)
    if out_MN.numel() and K:
        shape = Shape(M, N, K, a.scales.shape[-1])
        chosen = available(config or choose(shape, b.rows), a, b)
        run(a, b, out_MN, shape, DENSE.value, chosen, row_tiles=triton.cdiv(M, chosen.block_m))
    return out_MN if K else out_MN.zero_()


def config(M: int, N: int, K: int) -> Config:
    """Pick how a product on Hopper is cut, by its shape alone."""
    if M > _FEW_ROWS:
        return hopper_config(best_height(M, N))
    narrow = triton.cdiv(M, 64) * triton.cdiv(N, 128)
    splits = 1
    while narrow * splits < _MULTIPROCESSORS and splits < 4 and 8 * splits <= K // 128:
        splits *= 2
    return Config("plain", 64, 128, stages=4, splits=splits)


def hopper_config(height: int) -> Config:
    """Return the Hopper kernel's way with tiles of so many rows, with what memory allows ahead."""
    return Config("hopper", height, 128, stages=6 if height == 128 else 4)


def best_height(M: int, N: int, matrices: int = 1) -> int:
    """Return the height of tiles with which the Hopper kernel is done first, by count."""

    def cost(height: tuple[int, int]) -> int:
        rows, cycles = height
        tiles = triton.cdiv(M, rows) * triton.cdiv(N, 128) * matrices
        return triton.cdiv(tiles, _MULTIPROCESSORS) * cycles

    return min(_HEIGHTS, key=cost)[0]


def choose(shape: Shape, b_rows: int) -> Config:
    """Pick by shape and by how the scales of ``b`` lie."""
    chosen = config(shape.M, shape.N, shape.K)
    if b_rows == 1 and chosen.engine == "hopper":
        # Scales of columns need registers that taller tiles have not.
        return hopper_config(128)
    return chosen


def available(chosen: Config, a: Fp8, b: Fp8) -> Config:
    """Return ``chosen``, or what can run where it cannot: elsewhere than on Hopper, on odd rows."""
    if not product.copyable(a, b):
        # Loads byte by byte need many registers.
        return Config("plain", 64, 64, stages=2, copies=False)
    if chosen.engine != "hopper":
        return chosen
    device = a.codes.device
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER
    if hopper and not bits.interpreted():
        return chosen
    return Config("plain", 128, 128, stages=3, warps=8)


def run(
    a: Fp8, b: Fp8, out: Tensor, shape: Shape, form: int, chosen: Config,
    table: Any = None, total: Any = None, *, row_tiles: int,
) -> None:  # fmt: skip
    """Launch the kernel that ``chosen`` names, on contiguous operands."""
    a, b = _contiguous(a), _contiguous(b)
    if chosen.engine == "hopper":
        # Gluon is needed here only, and not every Triton has it.
        from ziphius.kernels.triton import hopper

        hopper.launch(a, b, out, shape, form, chosen, table, total, row_tiles=row_tiles)
    else:
        product.launch(
            a, b, out, shape, form, chosen, table, total,
            row_tiles=row_tiles, interpreted=bits.interpreted(),
        )  # fmt: skip


def _contiguous(q: Fp8) -> Fp8:
    return q._replace(codes=q.codes.contiguous(), scales=q.scales.contiguous())
