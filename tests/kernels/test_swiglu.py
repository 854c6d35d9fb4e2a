"""SwiGLU with the routing weight folded in."""

from __future__ import annotations

import math

import pytest
import torch

from ziphius.kernels.swiglu import swiglu, swiglu_reference

VERSIONS = {"reference": swiglu_reference, "recomputed": swiglu}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_by_hand(version: str, weighted: bool) -> None:
    gate_MF, up_MF = torch.randn(2, 6, 5, dtype=torch.float64)
    gates_M = torch.rand(6, dtype=torch.float64) if weighted else None
    out_MF = VERSIONS[version](gate_MF, up_MF, gates_M)
    for m in range(6):
        for f in range(5):
            g, u = gate_MF[m, f].item(), up_MF[m, f].item()
            expected = g / (1 + math.exp(-g)) * u * (gates_M[m].item() if weighted else 1)
            assert out_MF[m, f].item() == pytest.approx(expected)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients(version: str, weighted: bool) -> None:
    inputs = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    if weighted:
        inputs.append(torch.rand(4, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(VERSIONS[version], inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_versions_agree_in_value_and_gradient(dtype: torch.dtype, weighted: bool) -> None:
    gate_MF, up_MF, dout_MF = torch.randn(3, 20, 8).to(dtype)
    gates_M = torch.rand(20) if weighted else None  # FP32, as the router makes them
    results = []
    for function in VERSIONS.values():
        g, u = gate_MF.clone().requires_grad_(), up_MF.clone().requires_grad_()
        w = None if gates_M is None else gates_M.clone().requires_grad_()
        out_MF = function(g, u, w)
        out_MF.backward(dout_MF)
        results.append([out_MF.detach(), g.grad, u.grad] + ([w.grad] if weighted else []))
    for reference, recomputed in zip(*results, strict=True):
        assert reference.dtype == recomputed.dtype
        eps = max(torch.finfo(reference.dtype).eps, torch.finfo(dtype).eps)
        torch.testing.assert_close(recomputed, reference, rtol=2 * eps, atol=20 * eps)


def test_bfloat16_is_rounded_once() -> None:
    gate_MF, up_MF, gates_M = torch.randn(50, 8).bfloat16(), torch.randn(50, 8), torch.rand(50)
    up_MF = up_MF.bfloat16()
    out_MF = swiglu(gate_MF, up_MF, gates_M)
    exact_MF = swiglu_reference(gate_MF.double(), up_MF.double(), gates_M.double())
    assert out_MF.dtype == torch.bfloat16
    torch.testing.assert_close(out_MF.double(), exact_MF, rtol=2**-8 * 1.01, atol=0)


def test_backward_leaves_the_incoming_gradient_alone() -> None:
    """Autograd hands one tensor to both terms of a sum: the other one needs it unchanged."""
    gate_MF, other_MF = torch.randn(2, 4, 3).unbind(0)
    gate_MF.requires_grad_()
    other_MF.requires_grad_()
    up_MF, dout_MF = torch.randn(4, 3), torch.randn(4, 3)
    kept_MF = dout_MF.clone()
    (swiglu(gate_MF, up_MF) + other_MF).backward(dout_MF)
    assert torch.equal(dout_MF, kept_MF)
    assert torch.equal(other_MF.grad, kept_MF)


def test_backward_keeps_no_activation() -> None:
    """Only the inputs are saved (facts 5.7)."""
    saved: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.data_ptr())
        return x

    gate_MF = torch.randn(4, 3, requires_grad=True)
    up_MF, gates_M = torch.randn(4, 3), torch.rand(4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        swiglu(gate_MF, up_MF, gates_M)
    assert sorted(saved) == sorted(x.data_ptr() for x in (gate_MF, up_MF, gates_M))
