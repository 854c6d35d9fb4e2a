"""Sums over documents: alone, by shares of several processes, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import F64, random_model
from ziphius.alignment.documents import DocumentSums, documents_in
from ziphius.alignment.pairs import both, count_pairs, mean_of_pairs, pairs_of_rows, wins
from ziphius.data.rows import Batch
from ziphius.model.positions import AllPositions

LENGTHS = st.lists(st.integers(1, 4), max_size=5)


def rows_of(*rows: list[int], width: int = 24) -> Batch:
    """Rows of documents of these lengths, then padding."""
    documents_BS = torch.full((len(rows), width), -1, dtype=torch.int32)
    for place, lengths in enumerate(rows):
        end = 0
        for number, length in enumerate(lengths):
            documents_BS[place, end : end + length] = number
            end += length
    return Batch(torch.zeros_like(documents_BS, dtype=torch.int64), documents_BS)


@pytest.fixture(scope="module")
def model():
    return random_model(precision=F64)


@given(LENGTHS, LENGTHS)
def test_sums_are_those_of_a_loop(one: list[int], other: list[int]) -> None:
    model, rows = random_model(precision=F64), rows_of(one, other)
    values_Bt = torch.randn(2, 23, dtype=torch.float64)
    values_Bt = values_Bt.masked_fill(rows.documents_BS[:, :-1] < 0, 0)
    sums = DocumentSums.of_inputs(model, rows)
    found_Bd = sums(values_Bt)
    assert found_Bd.shape == (2, documents_in(rows))
    for b, lengths in enumerate((one, other)):
        for d in range(documents_in(rows)):
            expected = values_Bt[b][rows.documents_BS[b, :-1] == d].sum().item()
            assert found_Bd[b, d].item() == pytest.approx(expected)
            if d >= len(lengths):
                assert found_Bd[b, d].item() == 0
    inside_Bt = rows.documents_BS[:, :-1] >= 0
    spread_Bt = sums.of_tokens(values_Bt, inside_Bt)
    documents_Bt = rows.documents_BS[:, :-1].long().clamp(min=0)
    torch.testing.assert_close(spread_Bt[inside_Bt], found_Bd.gather(1, documents_Bt)[inside_Bt])


@dataclass
class _Half(AllPositions):
    """A process that has some positions, of two, and is told the other's sums."""

    others: torch.Tensor | None = None

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.others is None else x + self.others


def test_what_lies_elsewhere_is_in_the_sum_and_not_in_its_gradient(model) -> None:
    documents_Bj = torch.tensor([[0, 0, 1]])
    here_Bj = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64, requires_grad=True)
    model.positions = _Half(torch.tensor([[10.0, 20.0]], dtype=torch.float64))
    try:
        counted_j = torch.tensor([True, False, True])
        sums = DocumentSums(model, documents_Bj, 2, counted_j)
        found_Bd = sums(here_Bj)
        # 1 and 4 are counted here; 2 is counted by whoever sent 10.
        assert found_Bd.tolist() == [[11.0, 24.0]]
        found_Bd.sum().backward()
        assert here_Bj.grad is not None
        assert here_Bj.grad.tolist() == [[1.0, 1.0, 1.0]]
        model.positions.others = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
        shares_Bd = sums.share_here(torch.ones(1, 3, dtype=torch.float64))
        assert shares_Bd.tolist() == [[0.25, 1.0]]
        # One of two tokens is here: it tells its gradient for both.
        here_Bj.grad = None
        model.positions.others = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
        told_Bj = sums.of_tokens(here_Bj, torch.tensor([[False, False, True]]))
        told_Bj[0, 2].backward()
        assert here_Bj.grad.tolist() == [[0.0, 0.0, 2.0]]
    finally:
        model.positions = AllPositions()


@given(st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=4))
def test_pairs_are_counted_where_both_documents_are(pairs: list[list[int]]) -> None:
    rows = rows_of(*[[length for length in row for _ in range(2)] for row in pairs])
    assert count_pairs(rows) == sum(map(len, pairs))
    assert pairs_of_rows(rows).sum(1).tolist() == [len(row) for row in pairs]
    values_Bp = torch.ones(pairs_of_rows(rows).shape)
    assert mean_of_pairs(values_Bp, rows, 7).item() == pytest.approx(sum(map(len, pairs)) / 7)


def test_pairs_are_neighbours() -> None:
    chosen_Bp, rejected_Bp = both(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert (chosen_Bp.tolist(), rejected_Bp.tolist()) == ([[1.0, 3.0]], [[2.0, 4.0]])


def test_a_tie_counts_half() -> None:
    assert wins(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])).tolist() == [
        1,
        0,
        0.5,
    ]
