"""RMSNorm: the formula, its gradients, and what is kept for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ziphius.kernels.norm import (
    norm_backward_reference,
    norm_tiles_reference,
    rms_norm,
    rms_norm_reference,
)
from ziphius.kernels.quantize import quantize_tiles

VERSIONS = {"reference": rms_norm_reference, "recomputed": rms_norm}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_equals_torchs(version: str, shape: tuple[int, ...], eps: float) -> None:
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(VERSIONS[version](x, weight, eps), F.rms_norm(x, (5,), weight, eps))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3), (3,)])
def test_gradients(version: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, g: VERSIONS[version](x, g, 1e-2), (x, weight))


@pytest.mark.parametrize("version", VERSIONS)
def test_mixed_dtypes_are_computed_in_fp32(version: str) -> None:
    """BF16 rows under FP32 gains, as in training: every result rounded once."""
    x = (torch.randn(40, 32) * 3).bfloat16().requires_grad_()
    weight = torch.randn(32).requires_grad_()
    dout = torch.randn(40, 32).bfloat16()
    out = VERSIONS[version](x, weight, 1e-6)
    out.backward(dout)
    exact_x = x.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    exact = F.rms_norm(exact_x, (32,), exact_weight, 1e-6)
    exact.backward(dout.double())
    assert (out.dtype, x.grad.dtype, weight.grad.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    once = {"rtol": 2**-8 * 1.01, "atol": 1e-6}
    torch.testing.assert_close(out.double(), exact, **once)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, **once)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-4)


def test_gradients_that_arrive_expanded_and_stay_unchanged() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    dout = torch.ones(1, 1).expand(4, 3)
    weight = torch.linspace(1, 2, 3)
    rms_norm(x, weight, 1e-6).backward(dout)
    expected = torch.autograd.grad(F.rms_norm(x, (3,), weight, 1e-6), x, dout)
    torch.testing.assert_close((x.grad,), expected)
    assert (dout == 1).all()


def test_rows_of_zeros_are_finite() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    out = rms_norm(x, torch.ones(3), 1e-6)
    out.sum().backward()
    assert not out.any()
    assert x.grad.isfinite().all()


def test_nothing_of_the_inputs_size_is_kept_but_the_input() -> None:
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    x, weight = torch.randn(6, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rms_norm(x, weight, 1e-6)
    assert sorted(t.numel() for t in kept) == [5, 6, 30]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


@settings(max_examples=30)
@given(
    st.integers(1, 20),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_the_tiles_are_those_of_the_norm_as_it_is_returned(
    M: int, D: int, dtype: torch.dtype, power_of_two: bool
) -> None:
    x, weight = (torch.randn(M, D) * 3).to(dtype), torch.randn(D)
    value, q, inverse_root = norm_tiles_reference(x, weight, 1e-6, power_of_two=power_of_two)
    assert torch.equal(value, rms_norm(x, weight, 1e-6))
    expected = quantize_tiles(value, power_of_two=power_of_two)
    assert torch.equal(q.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(q.scales, expected.scales)
    exact = 1 / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(inverse_root.double(), exact, rtol=1e-6, atol=0)


def test_backward_of_what_was_kept_is_autograds() -> None:
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(2, 5, 7, dtype=torch.float64)
    rms_norm_reference(x, weight, 1e-2).backward(dout)
    kept = norm_tiles_reference(x.detach(), weight.detach(), 1e-2)[2]
    results = norm_backward_reference(x.detach(), weight.detach(), kept, dout)
    torch.testing.assert_close(results, (x.grad, weight.grad))
