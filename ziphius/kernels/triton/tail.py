"""A nearly empty last round of a product's tiles, cut along K so that no program is idle.

Programs go through items: first whole tiles, as many rounds as are full, then the pieces of the
tiles that are left. A piece is a share of K of one tile; its FP32 sums go to a workspace, and a
small kernel adds up the pieces of every tile in their order: results do not depend on timing.
(Early launch of the small kernel gained nothing. If programs added up what they find finished, a
counter would have to be cleared before each product, by a launch of its own, and one program a
tile would read what 8 read now.)
"""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.triton.tiles import DENSE, locate

# Tiles are of so many rows and columns.
SIDE = 128
# Rows of a tile that one program of the small kernel adds up.
_ROWS = 16
# Where it was measured to pay: full rounds at most, and of the last one less than one in so many
# programs at work. With 13 rounds, or most of the last one full, it loses.
_MOST_ROUNDS, _ONE_IN = 8, 4
# What it costs beside the products of the pieces, in products of 128 of K of a tile, as measured:
# to store the pieces, to read them again, and a launch.
_COST = 28


class Tail(NamedTuple):
    """``whole`` tiles, then ``rest`` in ``pieces`` each, of ``share`` groups of K or fewer.

    Item ``whole + piece * rest + i`` is a piece of tile ``whole + i``.
    """

    whole: int
    rest: int
    pieces: int
    share: int

    @property
    def items(self) -> int:
        """Return how many items there are."""
        return self.whole + self.rest * self.pieces

    def steps(self, programs: int, groups: int) -> int:
        """Return what the busiest program does, in groups of K of a tile."""
        whole = triton.cdiv(self.whole, programs) * groups
        return whole + self.share + _COST if self.rest else whole


def uncut(tiles: int, groups: int) -> Tail:
    """Return what leaves every tile whole."""
    return Tail(tiles, 0, 1, groups)


def cut_tail(tiles: int, programs: int, groups: int, at_once: int) -> Tail:
    """Say how ``tiles`` of ``groups`` of K, taken ``at_once`` at a time, go over ``programs``.

    Without a gain, everything is whole.
    """
    rounds, rest = divmod(tiles, programs)
    whole = uncut(tiles, groups)
    if not rest or rounds > _MOST_ROUNDS or _ONE_IN * rest >= programs:
        return whole
    share = triton.cdiv(triton.cdiv(groups, programs // rest), at_once) * at_once
    cut = Tail(rounds * programs, rest, triton.cdiv(groups, share), share)
    return min(whole, cut, key=lambda way: way.steps(programs, groups))


@triton.jit
def _tail_kernel(
    parts, out, whole, rest, M, N,
    BAND: tl.constexpr, PIECES: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    _, row, end, column, _, _ = locate(
        whole + tile, out, tl.cdiv(M, SIDE), M, N, 1, DENSE, SIDE, SIDE, BAND
    )
    inner_rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inner_columns = tl.arange(0, SIDE)
    rows, columns = row + inner_rows, column + inner_columns
    inside = (rows < end)[:, None] & (columns < N)[None, :]
    at = parts + tile.to(tl.int64) * (SIDE * SIDE)
    at += inner_rows[:, None] * SIDE + inner_columns[None, :]
    step = tl.cast(rest, tl.int64) * (SIDE * SIDE)
    sums = tl.zeros((ROWS, SIDE), tl.float32)
    for _ in tl.static_range(PIECES):
        sums += tl.load(at, mask=inside, other=0.0)
        at += step
    out_at = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=inside)


def workspace(tail: Tail, device: torch.device) -> Tensor:
    """Return room for the sums of pieces: FP32 ``[pieces * rest, 128, 128]``."""
    return torch.empty(tail.rest * tail.pieces, SIDE, SIDE, dtype=torch.float32, device=device)


def sum_pieces(parts: Tensor, out: Tensor, tail: Tail, band: int) -> None:
    """Add up ``parts`` into the tiles of ``out`` ``[M, N]`` that were cut, in order."""
    M, N = out.shape
    _tail_kernel[(tail.rest, SIDE // _ROWS)](
        parts, out, tail.whole, tail.rest, M, N, band, tail.pieces, SIDE, _ROWS, num_warps=4
    )
