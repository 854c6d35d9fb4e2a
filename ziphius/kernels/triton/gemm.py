"""The FP8 product ``A B^T`` on a GPU: ``kernels/gemm.py`` says what it is."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ziphius.kernels.quantize import TILE, Fp8
from ziphius.kernels.triton import bits, product
from ziphius.kernels.triton.product import Config, Shape
from ziphius.kernels.triton.tail import cut_tail, uncut
from ziphius.kernels.triton.tiles import DENSE

PAIRS = Config("pairs", 128, 128, stages=6, at_once=4)
# What a benchmark sweeps; `config` picks among them.
CANDIDATES = (
    Config("hopper", 192, 128, stages=4),
    PAIRS,
    Config("plain", 128, 128, stages=4, warps=8),
    Config("plain", 128, 128, stages=4, warps=8, copies=False),
    Config("plain", 64, 128, stages=3),
    Config("plain", 64, 128, stages=4),
    Config("plain", 64, 128, stages=4, splits=2),
    Config("plain", 64, 128, stages=4, splits=4),
    Config("plain", 64, 64, stages=6),
    Config("plain", 64, 64, stages=6, splits=2),
    Config("plain", 64, 64, stages=6, splits=4),
)
# Of gradients of weights, where both operands have scales of rows, the first is the choice.
TILES_CANDIDATES = (
    PAIRS,
    Config("plain", 64, 128, stages=4),
)
# What large products choose among, and what 128 of K of a tile cost: cycles, as measured.
LARGE = (
    (Config("hopper", 192, 128, stages=4), 1050),
    (PAIRS, 660),
)
_MULTIPROCESSORS = 132
# Up to so many, a product waits for memory, and more programs must ask for it at one time: about
# two a multiprocessor, each with so many groups of K that adding up their sums costs little.
_FEW_ROWS = 128
_PROGRAMS = 2 * _MULTIPROCESSORS
_FEW_GROUPS = 14
_HOPPER = 9


def gemm_triton(
    a: Fp8, b: Fp8, dtype: torch.dtype, *, config: Config | None = None, spared: int = 0
) -> Tensor:
    """Do what ``gemm_reference`` does. ``config`` replaces the choice, for a benchmark.

    ``spared`` multiprocessors are left to others by kernels whose programs stay.

    Sums of 128 products are the tensor cores', which keep about 14 bits of them.
    """
    (M, K), N = a.codes.shape, b.codes.shape[0]
    out_MN = torch.empty(M, N, dtype=dtype, device=a.codes.device)
    if out_MN.numel() and K:
        shape = Shape(M, N, K, a.scales.shape[-1])
        chosen = available(config or choose(shape, b.rows), a, b)
        row_tiles = triton.cdiv(M, chosen.block_m)
        run(a, b, out_MN, shape, DENSE.value, chosen, row_tiles=row_tiles, spared=spared)
    return out_MN if K else out_MN.zero_()


def config(M: int, N: int, K: int) -> Config:
    """Pick how a product on Hopper is cut, by its shape alone."""
    large_tiles = triton.cdiv(M, 128) * triton.cdiv(N, 128)
    if M > 2 * _FEW_ROWS or (M > _FEW_ROWS and 3 * large_tiles > _MULTIPROCESSORS):
        return best_large(M, N, K)
    rows = triton.cdiv(M, 64)
    tiles, narrow = rows * triton.cdiv(N, 128), rows * triton.cdiv(N, 64)
    if tiles >= _MULTIPROCESSORS:
        return Config("plain", 64, 128, stages=3)
    splits = _splits(tiles, K)
    if 4 * tiles * splits >= 3 * _PROGRAMS:
        return Config("plain", 64, 128, stages=4, splits=splits)
    return Config("plain", 64, 64, stages=6, splits=_splits(narrow, K))


def _splits(tiles: int, K: int) -> int:
    """Return how many programs share a tile's sum, so that all together are enough."""
    allowed = [
        s for s in (1, 2, 4) if s * tiles <= _PROGRAMS and s * _FEW_GROUPS <= triton.cdiv(K, TILE)
    ]
    return max(allowed, default=1)


def best_large(M: int, N: int, K: int, matrices: int = 1) -> Config:
    """Return the way that is done first, by count: tiles go round by round, one a program.

    ``matrices`` of ``M`` rows each are segments. The last round of one matrix may be cut.
    """
    groups = triton.cdiv(K, TILE)

    def cost(way: tuple[Config, int]) -> int:
        chosen, cycles = way
        tiles = triton.cdiv(M, chosen.block_m) * triton.cdiv(N, chosen.block_n) * matrices
        tail = uncut(tiles, groups)
        if chosen == PAIRS and matrices == 1:
            tail = cut_tail(tiles, _MULTIPROCESSORS, groups, chosen.at_once)
        return tail.steps(_MULTIPROCESSORS, groups) * cycles

    return min(LARGE, key=cost)[0]


def choose(shape: Shape, b_rows: int) -> Config:
    """Pick by shape and by how the scales of ``b`` lie."""
    chosen = config(shape.M, shape.N, shape.K)
    if b_rows == 1 and chosen.engine != "plain":
        # Scales of columns need registers that larger tiles have not.
        return TILES_CANDIDATES[0]
    return chosen


def available(chosen: Config, a: Fp8, b: Fp8) -> Config:
    """Return ``chosen``, or what can run where it cannot: elsewhere than on Hopper, on odd rows."""
    if not product.copyable(a, b):
        # Loads byte by byte need many registers.
        return Config("plain", 64, 64, stages=2, copies=False)
    if chosen.engine == "plain":
        return chosen
    device = a.codes.device
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER
    if hopper and not bits.interpreted():
        return chosen
    return Config("plain", 128, 128, stages=3, warps=8)


def run(
    a: Fp8, b: Fp8, out: Tensor, shape: Shape, form: int, chosen: Config,
    table: Any = None, total: Any = None, *, row_tiles: int, spared: int = 0,
) -> None:  # fmt: skip
    """Launch the kernel that ``chosen`` names, on contiguous operands."""
    a, b = _contiguous(a), _contiguous(b)
    if chosen.engine != "plain":
        seats = programs(out.device, spared)
    if chosen.engine == "hopper":
        # Gluon is needed here only, and not every Triton has it.
        from ziphius.kernels.triton import hopper

        hopper.launch(
            a, b, out, shape, form, chosen, table, total, row_tiles=row_tiles, programs=seats
        )
    elif chosen.engine == "pairs":
        from ziphius.kernels.triton import hopper_pairs

        hopper_pairs.launch(
            a, b, out, shape, form, chosen, table, total, row_tiles=row_tiles, programs=seats
        )
    else:
        product.launch(
            a, b, out, shape, form, chosen, table, total,
            row_tiles=row_tiles, interpreted=bits.interpreted(),
        )  # fmt: skip


def programs(device: torch.device, spared: int) -> int:
    """Return how many programs that stay a GPU gets: one a multiprocessor but for ``spared``."""
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count - spared)


def _contiguous(q: Fp8) -> Fp8:
    return q._replace(codes=q.codes.contiguous(), scales=q.scales.contiguous())
