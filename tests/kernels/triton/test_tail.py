"""Cutting the last round of tiles along K: nothing is lost or done twice, and sums are in order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ziphius.kernels.triton.tail import SIDE, Tail, cut_tail, sum_pieces, uncut, workspace

AT_ONCE = 4


@given(st.integers(1, 700), st.integers(1, 132), st.integers(1, 150))
def test_every_group_of_every_tile_is_in_one_item(tiles: int, programs: int, groups: int) -> None:
    tail = cut_tail(tiles, programs, groups, AT_ONCE)
    assert tail.whole + tail.rest == tiles
    if tail.rest:
        assert tail.whole % programs == 0
        # Pieces go round once.
        assert tail.rest * tail.pieces <= programs
        assert tail.share % AT_ONCE == 0
        # No piece is empty.
        assert (tail.pieces - 1) * tail.share < groups <= tail.pieces * tail.share
        assert tail.steps(programs, groups) < -(-tiles // programs) * groups


def test_the_reports_tails() -> None:
    # 544 tiles on 132 programs: 16 are left, whose 56 groups go to 112 programs.
    assert cut_tail(4096 // 128 * 17, 132, 56, AT_ONCE) == (528, 16, 7, 8)
    for N, K in ((24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)):
        tiles, groups = 32 * N // 128, K // 128
        assert cut_tail(tiles, 132, groups, AT_ONCE) == uncut(tiles, groups)
    # Few groups are done before their sums are read again.
    assert cut_tail(544, 132, 28, AT_ONCE) == uncut(544, 28)


@pytest.mark.parametrize("band", [1, 2, 8])
def test_sums_of_pieces(band: int, device: torch.device) -> None:
    # 3 x 2 tiles that jut out, of which 4 programs leave 2.
    M, N = 300, 200
    tail = Tail(4, 2, 5, 8)
    parts = workspace(tail, device)
    assert parts.shape == (2 * tail.pieces, SIDE, SIDE)
    parts.copy_(torch.randn(parts.shape, generator=torch.Generator().manual_seed(0)))
    out = torch.full((M, N), -1.0, device=device)
    sum_pieces(parts, out, tail, band)
    right = torch.full((M, N), -1.0)
    bands = [range(first, min(first + band, 3)) for first in range(0, 3, band)]
    order = [(row, column) for rows in bands for column in range(2) for row in rows]
    pieces = parts.cpu().view(tail.pieces, 2, SIDE, SIDE)
    for i, (row, column) in enumerate(order[tail.whole :]):
        sums = torch.zeros(SIDE, SIDE)
        for piece in pieces[:, i]:
            sums += piece
        place = right[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        place.copy_(sums[: len(place), : place.shape[1]])
    assert torch.equal(out.cpu(), right)
