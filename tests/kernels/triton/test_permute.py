"""Permutes and the sort before them are the reference's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.triton.support import DEVICE, ON_GPU, STORAGE, assert_same, on_cpu
from ziphius.kernels.permute import permute, permute_tiles, unpermute
from ziphius.kernels.quantize import Fp8, quantize_tiles
from ziphius.kernels.triton import permute as permute_kernels
from ziphius.kernels.triton.permute import (
    TilesLaunch,
    permute_tiles_triton,
    permute_triton,
    sort_by_slot_triton,
    unpermute_triton,
)
from ziphius.model.dispatch import sort_by_slot

few = settings(max_examples=40 if ON_GPU else 15)
seeds = st.integers(0, 10**6)


def choice(N: int, K: int, E: int, seed: int) -> Tensor:
    """Draw ``K`` different slots of ``E`` for every token, unevenly."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(N, E, generator=generator) + torch.rand(E, generator=generator)
    return scores.topk(K).indices.to(DEVICE)


def sorted_pairs(N: int, K: int, seed: int) -> tuple[Tensor, Tensor]:
    sort = sort_by_slot(choice(N, K, 9, seed), 9)
    return sort.order_M, sort.inverse_M


@few
@given(st.integers(1, 150), st.integers(1, 8), st.integers(8, 40), seeds)
def test_sorts_as_the_model_does(N: int, K: int, E: int, seed: int) -> None:
    slots_NK = choice(N, K, E, seed)
    expected = sort_by_slot(slots_NK, E)
    order_M, inverse_M, counts_E = sort_by_slot_triton(slots_NK, E)
    assert torch.equal(order_M, expected.order_M)
    assert torch.equal(inverse_M, expected.inverse_M)
    assert torch.equal(counts_E, expected.counts_E)
    assert order_M.dtype == inverse_M.dtype == counts_E.dtype == torch.int64


def test_all_tokens_to_one_slot_keep_their_order() -> None:
    slots_NK = torch.full((700, 1), 3, device=DEVICE)
    order_M, inverse_M, counts_E = sort_by_slot_triton(slots_NK, 5)
    assert torch.equal(on_cpu(order_M), torch.arange(700))
    assert torch.equal(on_cpu(inverse_M), torch.arange(700))
    assert counts_E.tolist() == [0, 0, 0, 700, 0]


def test_no_tokens() -> None:
    order_M, inverse_M, counts_E = sort_by_slot_triton(choice(0, 2, 5, 0), 5)
    assert len(order_M) == len(inverse_M) == 0
    assert counts_E.tolist() == [0] * 5
    u_ND = torch.randn(0, 7, device=DEVICE)
    assert permute_triton(u_ND, order_M, inverse_M, 2).shape == (0, 7)
    assert unpermute_triton(u_ND, order_M, inverse_M, 2).shape == (0, 7)
    q = quantize_tiles(u_ND)
    assert permute_tiles_triton(q, order_M, inverse_M, 2).scales.shape == (0, 1)


@pytest.mark.parametrize("scan", [2, permute_kernels.SCAN])
def test_many_slots_and_more_programs_than_a_scan_takes_at_once(
    scan: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permute_kernels, "SCAN", scan)
    slots_NK = choice(90, 8, 70, 1)
    expected = sort_by_slot(slots_NK, 70)
    order_M, _, counts_E = sort_by_slot_triton(slots_NK, 70)
    assert torch.equal(order_M, expected.order_M)
    assert torch.equal(counts_E, expected.counts_E)


@few
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 2500), seeds)
def test_moved_and_summed(N: int, K: int, D: int, seed: int) -> None:
    order_M, inverse_M = sorted_pairs(N, K, seed)
    u_ND = torch.randn(N, D).to(STORAGE).to(DEVICE)
    rows_MD = permute_triton(u_ND, order_M, inverse_M, K)
    assert torch.equal(rows_MD, permute(u_ND, order_M, inverse_M, K))
    rows_MD = (torch.randn(N * K, D) * torch.logspace(-3, 3, N * K)[:, None]).to(STORAGE)
    summed_ND = unpermute_triton(rows_MD.to(DEVICE), order_M, inverse_M, K)
    expected_ND = unpermute(rows_MD, on_cpu(order_M), on_cpu(inverse_M), K)
    assert torch.equal(on_cpu(summed_ND), expected_ND)


@few
@given(
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 2500),
    st.sampled_from(permute_kernels.TILES_CANDIDATES),
    seeds,
)
def test_tiles_moved(N: int, K: int, D: int, launch: TilesLaunch, seed: int) -> None:
    where = *sorted_pairs(N, K, seed), K
    q = quantize_tiles(torch.randn(N, D))
    there = Fp8(q.codes.to(DEVICE), q.scales.to(DEVICE))
    moved = permute_tiles_triton(there, *where, launch=launch)
    assert_same(moved, permute_tiles(q, on_cpu(where[0]), on_cpu(where[1]), K))


def test_each_is_the_others_backward() -> None:
    order_M, inverse_M = sorted_pairs(4, 3, 0)
    u_ND = torch.randn(4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    rows_MD = torch.randn(12, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: permute_triton(u, order_M, inverse_M, 3), (u_ND,))
    assert torch.autograd.gradcheck(
        lambda rows: unpermute_triton(rows, order_M, inverse_M, 3), (rows_MD,)
    )


def test_gradients_that_arrive_expanded() -> None:
    order_M, inverse_M = sorted_pairs(6, 2, 0)
    u_ND = torch.randn(6, 5, device=DEVICE, requires_grad=True)
    permute_triton(u_ND, order_M, inverse_M, 2).sum().backward()
    assert torch.equal(on_cpu(u_ND.grad), torch.full((6, 5), 2.0))


@pytest.mark.skipif(not ON_GPU, reason="the interpreter is too slow for layers of real sizes")
def test_sizes_of_the_report() -> None:
    slots_NK = choice(4096, 8, 256, 2)
    order_M, inverse_M, counts_E = sort_by_slot_triton(slots_NK, 256)
    expected = sort_by_slot(slots_NK, 256)
    assert torch.equal(order_M, expected.order_M)
    assert torch.equal(counts_E, expected.counts_E)
    u_ND = torch.randn(4096, 7168, device=DEVICE).bfloat16()
    rows_MD = permute_triton(u_ND, order_M, inverse_M, 8)
    assert torch.equal(rows_MD, permute(u_ND, order_M, inverse_M, 8))
    summed_ND = unpermute_triton(rows_MD, order_M, inverse_M, 8)
    assert torch.equal(summed_ND, unpermute(rows_MD, order_M, inverse_M, 8))
