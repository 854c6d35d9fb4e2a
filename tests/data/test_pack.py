"""Packing: pieces share their borders, rows are best fits, and nothing is lost."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ziphius.data.pack import best_fit, cut

lengths_and_row = st.integers(2, 40).flatmap(
    lambda row: st.tuples(st.lists(st.integers(1, 5 * row), max_size=60), st.just(row))
)


def pieces_of(length: int, row: int) -> list[tuple[int, int]]:
    """Cut one document step by step: (start, length) of each piece."""
    pieces, start = [], 0
    while length - start > row:
        pieces.append((start, row))
        start += row - 1
    return [*pieces, (start, length - start)]


@given(given_=lengths_and_row)
def test_documents_are_cut_into_rows_that_share_their_border(
    given_: tuple[list[int], int],
) -> None:
    lengths, row = given_
    found = cut(np.array(lengths, dtype=np.int64), row)
    expected = [(i, *piece) for i, n in enumerate(lengths) for piece in pieces_of(n, row)]
    assert list(zip(found.document, found.start, found.length, strict=True)) == expected


@given(given_=lengths_and_row)
def test_every_token_but_the_first_is_in_one_piece_behind_its_first(
    given_: tuple[list[int], int],
) -> None:
    lengths, row = given_
    pieces = cut(np.array(lengths, dtype=np.int64), row)
    targets = Counter(
        (int(d), int(s) + i)
        for d, s, n in zip(pieces.document, pieces.start, pieces.length, strict=True)
        for i in range(1, n)
    )
    assert targets == Counter((d, i) for d, n in enumerate(lengths) for i in range(1, n))


def test_a_document_without_tokens_has_no_piece() -> None:
    assert cut(np.array([0, 3, 0]), 4).document.tolist() == [1]


def slow_best_fit(lengths: list[int], row: int) -> list[int]:
    """The textbook: longest first, each into the fullest row with room. Returns the fills."""
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, fill in enumerate(fills) if fill + length <= row]
        if fitting:
            best = max(fitting, key=lambda i: fills[i])
            fills[best] += length
        else:
            fills.append(length)
    return sorted(fills)


@given(
    given_=st.integers(2, 30).flatmap(
        lambda row: st.tuples(st.lists(st.integers(1, row), max_size=80), st.just(row))
    )
)
def test_rows_are_those_of_best_fit_decreasing(given_: tuple[list[int], int]) -> None:
    lengths, row = given_
    placed = best_fit(np.array(lengths, dtype=np.int64), row)
    fills = np.bincount(placed, weights=lengths) if lengths else np.zeros(0)
    assert sorted(fills.astype(int).tolist()) == slow_best_fit(lengths, row)
    assert set(placed.tolist()) == set(range(len(fills)))


def test_packing_many_short_pieces_wastes_little() -> None:
    lengths = 2 + np.arange(200_000, dtype=np.int64) * 7919 % 600
    rows = best_fit(lengths, 4097).max() + 1
    assert lengths.sum() / (rows * 4097) > 0.999
