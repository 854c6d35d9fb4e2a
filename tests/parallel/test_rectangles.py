"""Flat slices of tensors as rectangles of the whole ones."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from ziphius.model.weights import Split
from ziphius.parallel.rectangles import cut, rectangles

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@given(SHAPES, st.data())
def test_rectangles_are_the_slice_in_its_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers = torch.arange(size).view(shape)
    found = list(cut(shape, start, stop))
    joined = [
        numbers[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))].flatten()
        for offsets, sizes in found
    ]
    assert torch.equal(torch.cat([*joined, numbers.new_empty(0)]), numbers.flatten()[start:stop])
    assert all(prod(sizes) for _, sizes in found)
    # No more than there must be: of a matrix the end of a row, whole rows, the start of a row.
    assert len(found) <= 2 * len(shape) - 1


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1), st.data())
def test_a_piece_of_a_cut_weight_knows_where_it_is(
    rows: int, columns: int, dim: int, data: st.DataObject
) -> None:
    shape = [rows, columns]
    first = data.draw(st.integers(0, shape[dim] - 1))
    length = data.draw(st.integers(1, shape[dim] - first))
    whole = torch.arange(rows * columns).view(rows, columns)
    own = whole.narrow(dim, first, length).contiguous()
    start = data.draw(st.integers(0, own.numel()))
    flat = own.flatten()[start:]
    split = Split(dim, first, own.shape[dim], shape[dim])
    pieces = list(rectangles("w", own.shape, split, start, flat))
    assert sum(piece.data.numel() for piece in pieces) == flat.numel()
    for name, (row, column), size, part in pieces:
        assert (name, size) == ("w", (rows, columns))
        assert torch.equal(part, whole[row : row + part.shape[0], column : column + part.shape[1]])
