"""Cross entropy of rows: against torch in float64, the gradient in place, what is ignored."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.triton.conftest import ON_GPU
from tests.kernels.triton.near import assert_near
from ziphius.kernels.loss import IGNORED, linear_cross_entropy
from ziphius.kernels.triton.loss import Launch, cross_entropy_rows_triton


def expected(logits_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
    """Return torch's loss and gradient in float64."""
    wide_nV = logits_nV.cpu().double().requires_grad_()
    loss = F.cross_entropy(wide_nV, targets_n.cpu(), ignore_index=IGNORED, reduction="sum")
    (gradient_nV,) = torch.autograd.grad(loss, wide_nV)
    return loss.detach(), gradient_nV


def check_gradient(found_nV: Tensor, exact_nV: Tensor) -> None:
    """Compare every number: rounded once, after FP32 that lost something where 1 is taken off."""
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[found_nV.dtype]
    torch.testing.assert_close(found_nV.cpu().double(), exact_nV, rtol=rtol, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([1, 2, 7, 64, 100, 257]),
    st.sampled_from([32, 64, 8192]),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
def test_loss_and_gradient(
    device: torch.device, storage: torch.dtype, n: int, V: int, columns: int, kept: int, seed: int
) -> None:
    """Rows of any width, some ignored."""
    torch.manual_seed(seed)
    logits_nV = (torch.randn(n, V) * 5).to(device, storage)
    targets_n = torch.randint(0, V, (n,), device=device)
    targets_n[torch.rand(n, device=device) < 0.3] = IGNORED
    loss, gradient_nV = expected(logits_nV, targets_n)
    found = cross_entropy_rows_triton(logits_nV, targets_n, launch=Launch(columns, 4, 3, kept))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), loss, rtol=1e-5, atol=1e-5)
    check_gradient(logits_nV, gradient_nV)
    assert not logits_nV[targets_n == IGNORED].any()


def test_the_published_vocabulary(device: torch.device, storage: torch.dtype) -> None:
    torch.manual_seed(1)
    n = 300 if ON_GPU else 2
    logits_nV = (torch.randn(n, 129280) * 3).to(device, storage)
    targets_n = torch.randint(0, 129280, (n,), device=device)
    targets_n[0] = 129279
    loss, gradient_nV = expected(logits_nV, targets_n)
    found = cross_entropy_rows_triton(logits_nV, targets_n)
    torch.testing.assert_close(found.cpu().double(), loss, rtol=1e-5, atol=1e-5)
    check_gradient(logits_nV, gradient_nV)


def test_rows_of_a_wider_buffer(device: torch.device, storage: torch.dtype) -> None:
    buffer = torch.randn(3, 50).to(device, storage)
    before, targets_n = buffer.clone(), torch.tensor([3, IGNORED, 0], device=device)
    cross_entropy_rows_triton(buffer[:, :40], targets_n)
    assert torch.equal(buffer[:, 40:], before[:, 40:])
    check_gradient(buffer[:, :40], expected(before[:, :40], targets_n)[1])


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_logits(device: torch.device, storage: torch.dtype, shift: float) -> None:
    logits_nV = (torch.tensor([[0.0, 1.0, 2.0, -(2.0**15)]]) * 64 + shift).to(device, storage)
    targets_n = torch.tensor([1], device=device)
    loss, gradient_nV = expected(logits_nV, targets_n)
    found = cross_entropy_rows_triton(logits_nV, targets_n)
    torch.testing.assert_close(found.cpu().double(), loss, rtol=1e-6, atol=1e-6)
    check_gradient(logits_nV, gradient_nV)


def test_logits_of_minus_infinity(device: torch.device, storage: torch.dtype) -> None:
    """Tokens that may not be have no weight, in the first place as well."""
    logits_nV = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]]).to(device, storage)
    targets_n = torch.tensor([2], device=device)
    found = cross_entropy_rows_triton(logits_nV, targets_n)
    torch.testing.assert_close(found.cpu(), torch.tensor(1.0).neg().exp().log1p())
    assert not logits_nV[0, [0, 3]].any()


def test_what_is_no_number_shows(device: torch.device, storage: torch.dtype) -> None:
    logits_nV = torch.randn(3, 70).to(device, storage)
    logits_nV[0, 60] = float("nan")
    ignored = torch.tensor([IGNORED, 1, 2], device=device)
    counted = torch.tensor([0, 1, 2], device=device)
    assert cross_entropy_rows_triton(logits_nV.clone(), ignored).isfinite()
    assert cross_entropy_rows_triton(logits_nV, counted).isnan()
    outside = torch.tensor([70, -1, 2], device=device)
    assert cross_entropy_rows_triton(logits_nV[1:].clone(), outside[:2]).isnan()


def test_no_rows(device: torch.device, storage: torch.dtype) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert cross_entropy_rows_triton(torch.empty(0, 9).to(device, storage), none) == 0


def test_the_loss_of_an_output_head(device: torch.device, storage: torch.dtype) -> None:
    """In chunks, the last of them short."""
    torch.manual_seed(2)
    hidden_ND = torch.randn(7, 16).to(device, storage).requires_grad_()
    weight_VD = torch.randn(50, 16).to(device, storage).requires_grad_()
    targets_N = torch.tensor([1, 2, IGNORED, 49, 0, 7, 7], device=device)
    rows_loss = cross_entropy_rows_triton
    loss = linear_cross_entropy(hidden_ND, weight_VD, targets_N, 3, rows_loss=rows_loss)
    loss.backward()
    wide = [x.detach().cpu().double().requires_grad_() for x in (hidden_ND, weight_VD)]
    exact = F.cross_entropy(wide[0] @ wide[1].T, targets_N.cpu(), reduction="sum")
    exact.backward()
    assert_near(loss.detach(), exact.detach(), storage)
    for mine, theirs in zip((hidden_ND, weight_VD), wide, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert_near(mine.grad, theirs.grad, storage)
