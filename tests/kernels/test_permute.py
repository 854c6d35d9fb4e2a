"""Permuting and its inverse are linear maps, each the other's transpose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ziphius.kernels.permute import permute, permute_tiles, unpermute
from ziphius.kernels.quantize import dequantize, quantize_tiles


def sorted_choice(N: int, K: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a choice of 5 experts; return (expert of each flat pair, order, inverse)."""
    generator = torch.Generator().manual_seed(seed)
    flat_M = torch.rand(N, 5, generator=generator).topk(K).indices.flatten()
    order_M = flat_M.argsort(stable=True)
    return flat_M, order_M, order_M.argsort()


sizes = given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))


@settings(max_examples=30)
@sizes
def test_rows_land_sorted_by_expert_and_come_back_summed(N: int, K: int, seed: int) -> None:
    flat_M, order_M, inverse_M = sorted_choice(N, K, seed)
    u_ND = torch.randn(N, 3, dtype=torch.float64)
    rows_MD = permute(u_ND, order_M, inverse_M, K)
    assert flat_M[order_M].diff().ge(0).all()
    for m, flat in enumerate(order_M.tolist()):
        assert torch.equal(rows_MD[m], u_ND[flat // K])
    torch.testing.assert_close(unpermute(rows_MD, order_M, inverse_M, K), K * u_ND)


@settings(max_examples=30)
@sizes
def test_each_token_sums_its_own_rows(N: int, K: int, seed: int) -> None:
    _, order_M, inverse_M = sorted_choice(N, K, seed)
    rows_MD = torch.randn(N * K, 3, dtype=torch.float64)
    expected_ND = torch.zeros(N, 3, dtype=torch.float64)
    for m, flat in enumerate(order_M.tolist()):
        expected_ND[flat // K] += rows_MD[m]
    torch.testing.assert_close(unpermute(rows_MD, order_M, inverse_M, K), expected_ND)


@settings(max_examples=30)
@sizes
def test_adjointness(N: int, K: int, seed: int) -> None:
    """``<permute(u), rows> == <u, unpermute(rows)>``."""
    _, order_M, inverse_M = sorted_choice(N, K, seed)
    u_ND = torch.randn(N, 3, dtype=torch.float64)
    rows_MD = torch.randn(N * K, 3, dtype=torch.float64)
    left = (permute(u_ND, order_M, inverse_M, K) * rows_MD).sum()
    right = (u_ND * unpermute(rows_MD, order_M, inverse_M, K)).sum()
    torch.testing.assert_close(left, right)


def test_gradients() -> None:
    _, order_M, inverse_M = sorted_choice(5, 3, 0)
    u_ND = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    rows_MD = torch.randn(15, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: permute(u, order_M, inverse_M, 3), (u_ND,))
    assert torch.autograd.gradcheck(lambda r: unpermute(r, order_M, inverse_M, 3), (rows_MD,))


@pytest.mark.parametrize("width", [64, 192, 7168])
def test_rows_of_real_widths_are_summed_one_after_the_other(width: int) -> None:
    """Bit for bit. Where the width is no multiple of 32, torch sums in four strands instead."""
    order_M = torch.randperm(5 * 8)
    rows_MD = torch.randn(40, width) * torch.logspace(-3, 3, 40)[:, None]
    out_ND = unpermute(rows_MD, order_M, order_M.argsort(), 8)
    expected_ND = torch.zeros(5, width)
    for flat, m in enumerate(order_M.argsort().tolist()):
        expected_ND[flat // 8] += rows_MD[m]
    assert torch.equal(out_ND, expected_ND)


def test_rows_are_summed_in_the_order_of_the_choices() -> None:
    """Floating sums depend on their order: it must be the token's, not the experts'."""
    order_M = torch.tensor([1, 2, 0])  # one token, three choices, sorted by expert
    rows_MD = torch.tensor([[1.0], [-1e8], [1e8]])
    # In the order of the choices: (1e8 + 1) - 1e8, where the 1 is lost.
    assert unpermute(rows_MD, order_M, order_M.argsort(), 3).item() == 0.0


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 300), st.integers(0, 10**6))
def test_quantising_and_permuting_commute(N: int, K: int, D: int, seed: int) -> None:
    """A tile is a part of one row, so moving codes and scales is moving numbers."""
    _, order_M, inverse_M = sorted_choice(N, K, seed)
    u_ND = torch.randn(N, D)
    moved = permute_tiles(quantize_tiles(u_ND), order_M, inverse_M, K)
    expected = quantize_tiles(permute(u_ND, order_M, inverse_M, K))
    assert torch.equal(moved.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(moved.scales, expected.scales)
    assert dequantize(moved).shape == (N * K, D)
