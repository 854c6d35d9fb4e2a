"""Cross entropy of a linear head in chunks, against torch's on all logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ziphius.kernels.loss import IGNORED, linear_cross_entropy


def inputs(N: int, D: int, V: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    hidden_ND = torch.randn(N, D, dtype=torch.float64).to(dtype)
    return hidden_ND, torch.randn(V, D, dtype=torch.float64).to(dtype)


@settings(max_examples=40)
@given(
    st.integers(1, 12),
    st.integers(2, 9),
    st.sampled_from([1, 2, 3, 5, 100]),
    st.integers(0, 10**6),
)
def test_equals_torch_for_any_chunk_and_ignored_targets(
    N: int, V: int, chunk: int, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden_ND, weight_VD = inputs(N, 4, V)
    targets_N = torch.randint(0, V, (N,)).where(torch.rand(N) < 0.7, IGNORED)
    results = []
    for ours in (True, False):
        h, w = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        if ours:
            loss = linear_cross_entropy(h, w, targets_N, chunk)
        else:
            loss = F.cross_entropy(h @ w.T, targets_N, ignore_index=-100, reduction="sum")
        (loss * 0.3).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_one_row_by_hand() -> None:
    hidden_ND, weight_VD = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    loss = linear_cross_entropy(hidden_ND, weight_VD, torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(math.e + math.e**2 + math.e**3) - 2, rel=1e-6)


@pytest.mark.parametrize("chunk", [2, 1024])
def test_gradients(chunk: int) -> None:
    hidden_ND, weight_VD = (x.requires_grad_() for x in inputs(5, 3, 4))
    targets_N = torch.tensor([0, 3, IGNORED, 1, 2])
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets_N, chunk), (hidden_ND, weight_VD)
    )


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    hidden_ND, weight_VD = (x.requires_grad_() for x in inputs(3, 4, 5))
    loss = linear_cross_entropy(hidden_ND, weight_VD, torch.tensor([0, 1, 2])).square()
    (first,) = torch.autograd.grad(loss, hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_all_targets_ignored() -> None:
    hidden_ND, weight_VD = (x.requires_grad_() for x in inputs(3, 4, 5))
    loss = linear_cross_entropy(hidden_ND, weight_VD, torch.full((3,), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert not hidden_ND.grad.any()
    assert not weight_VD.grad.any()


def test_only_the_gradients_that_are_asked_for() -> None:
    hidden_ND, weight_VD = inputs(3, 4, 5)
    targets_N = torch.tensor([0, 1, 2])
    assert not linear_cross_entropy(hidden_ND, weight_VD, targets_N).requires_grad
    for x in (hidden_ND, weight_VD):
        x.requires_grad_()
        linear_cross_entropy(hidden_ND, weight_VD, targets_N).backward()
        expected = torch.autograd.grad(
            F.cross_entropy(hidden_ND @ weight_VD.T, targets_N, reduction="sum"), x
        )
        torch.testing.assert_close((x.grad,), expected)
        x.requires_grad_(False)


def test_bfloat16_has_an_fp32_loss_and_bfloat16_gradients() -> None:
    hidden_ND, weight_VD = inputs(200, 16, 50, torch.bfloat16)
    targets_N = torch.randint(0, 50, (200,))
    h, w = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    loss = linear_cross_entropy(h, w, targets_N, chunk=64)
    loss.backward()
    assert loss.dtype == torch.float32
    assert (h.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    h64 = hidden_ND.double().requires_grad_()
    w64 = weight_VD.double().requires_grad_()
    exact = F.cross_entropy(h64 @ w64.T, targets_N, reduction="sum")
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    for got, expected in ((h.grad, h64.grad), (w.grad, w64.grad)):
        assert (got.double() - expected).norm() < 0.02 * expected.norm()


def test_the_loss_is_summed_in_fp32_over_many_bfloat16_rows() -> None:
    """A BF16 sum of 5000 terms would stand still."""
    hidden_ND, weight_VD = torch.zeros(5000, 2).bfloat16(), torch.zeros(3, 2).bfloat16()
    loss = linear_cross_entropy(hidden_ND, weight_VD, torch.zeros(5000, dtype=torch.int64), 7)
    assert loss.item() == pytest.approx(5000 * math.log(3), rel=1e-5)


def test_large_logits_are_finite() -> None:
    hidden_ND, weight_VD = torch.full((1, 1), 1e4), torch.tensor([[1.0], [-1.0]])
    loss = linear_cross_entropy(hidden_ND, weight_VD, torch.tensor([1]))
    assert loss.item() == pytest.approx(2e4)


def test_logits_are_never_all_in_memory() -> None:
    """The saved tensors are the two gradients: nothing has N times V numbers."""
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    hidden_ND, weight_VD = (x.requires_grad_() for x in inputs(40, 2, 30))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        linear_cross_entropy(hidden_ND, weight_VD, torch.zeros(40, dtype=torch.int64), 8)
    assert sorted(sizes) == [30 * 2, 40 * 2]
