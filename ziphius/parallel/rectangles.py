"""Pieces of tensors that ranks hold, as rectangles of the whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor

from ziphius.model.weights import Split

Numbers = tuple[int, ...]


# By the name of a weight; None where a rank holds it whole.
SplitOf = Callable[[str], Split | None]


def unsplit(name: str) -> Split | None:
    """Say that every weight is held whole."""
    return None


class Rectangle(NamedTuple):
    """A piece of the tensor ``name``, which is of shape ``whole``: it begins at ``offsets``."""

    name: str
    offsets: Numbers
    whole: Numbers
    data: Tensor


def place_of(shape: Sequence[int], split: Split | None) -> tuple[Numbers, Numbers]:
    """Return where a weight of a rank begins in the whole one, and the shape of that."""
    offsets, whole = [0] * len(shape), list(shape)
    if split is not None:
        offsets[split.dim], whole[split.dim] = split.start, split.whole
    return tuple(offsets), tuple(whole)


def cut(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Numbers, Numbers]]:
    """Cut the numbers ``start`` to ``stop`` of a tensor, in memory's order, into rectangles.

    Yields (offsets, sizes): the end of a row, whole rows, the beginning of a row, as they lie in
    memory; so of a matrix three at most.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,), (stop - start,)
        return
    row, rest = prod(shape[1:]), tuple(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        yield from _in_row(last, rest, start - last * row, stop - last * row)
        return
    yield from _in_row(first - 1, rest, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in rest)), (last - first, *rest)
    yield from _in_row(last, rest, 0, stop - last * row)


def _in_row(row: int, rest: Numbers, start: int, stop: int) -> Iterator[tuple[Numbers, Numbers]]:
    if start < stop:
        for offsets, sizes in cut(rest, start, stop):
            yield (row, *offsets), (1, *sizes)


def rectangles(
    name: str, shape: Sequence[int], split: Split | None, start: int, flat: Tensor
) -> Iterator[Rectangle]:
    """Yield the rectangles of ``flat``: what lies from ``start`` on in a rank's tensor.

    ``shape`` is that of the rank's tensor, of which ``split`` says where it is in the whole one.
    """
    corner, whole = place_of(shape, split)
    taken = 0
    for offsets, sizes in cut(shape, start, start + flat.numel()):
        end = taken + prod(sizes)
        where = tuple(a + b for a, b in zip(corner, offsets, strict=True))
        yield Rectangle(name, where, whole, flat[taken:end].view(sizes))
        taken = end
