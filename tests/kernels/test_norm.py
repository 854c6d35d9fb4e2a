"""RMSNorm: the formula, its gradients, and what is kept for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.kernels.norm import rms_norm, rms_norm_reference

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
