"""Grouped products: segments of rows meet the matrices of their own experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ziphius.kernels.grouped import COUNT_ON_DEVICE, VERSIONS, grouped_linear_reference

COUNTS = st.lists(st.integers(0, 6), min_size=1, max_size=7)


def run(version: str, x_MI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
    given = torch.tensor(counts) if version in COUNT_ON_DEVICE else counts
    return VERSIONS[version](x_MI, weight_EOI, given)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=30)
@given(COUNTS)
def test_every_row_meets_its_own_expert(version: str, counts: list[int]) -> None:
    x_MI = torch.randn(sum(counts), 4, dtype=torch.float64)
    weight_EOI = torch.randn(len(counts), 5, 4, dtype=torch.float64)
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    out_MO = run(version, x_MI, weight_EOI, counts)
    assert out_MO.shape == (sum(counts), 5)
    for row, expert in enumerate(owners):
        torch.testing.assert_close(out_MO[row], weight_EOI[expert] @ x_MI[row])


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=30)
@given(COUNTS)
def test_versions_have_the_gradients_of_the_reference(version: str, counts: list[int]) -> None:
    x_MI = torch.randn(sum(counts), 4, dtype=torch.float64)
    weight_EOI = torch.randn(len(counts), 5, 4, dtype=torch.float64)
    dout_MO = torch.randn(sum(counts), 5, dtype=torch.float64)
    grads = []
    for name in (version, "reference"):
        x, weight = x_MI.clone().requires_grad_(), weight_EOI.clone().requires_grad_()
        run(name, x, weight, counts).backward(dout_MO)
        grads.append((x.grad, weight.grad))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 5], [5], [1, 1, 1, 1, 1]])
def test_gradients_by_differences(version: str, counts: list[int]) -> None:
    x_MI = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight_EOI = torch.randn(len(counts), 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: run(version, x, w, counts), (x_MI, weight_EOI))


@pytest.mark.parametrize("version", VERSIONS)
def test_only_the_gradients_that_are_asked_for(version: str) -> None:
    x_MI, weight_EOI = torch.randn(5, 3), torch.randn(2, 4, 3)
    x = x_MI.clone().requires_grad_()
    run(version, x, weight_EOI, [2, 3]).sum().backward()
    weight = weight_EOI.clone().requires_grad_()
    run(version, x_MI, weight, [2, 3]).sum().backward()
    expected = torch.cat([weight_EOI[0].sum(0).expand(2, 3), weight_EOI[1].sum(0).expand(3, 3)])
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(weight.grad[1], x_MI[2:].sum(0).expand(4, 3))


@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_that_arrive_expanded(version: str) -> None:
    """The gradient of a sum is one number, repeated without memory of its own."""
    x_MI = torch.randn(4, 3, requires_grad=True)
    out_MO = run(version, x_MI, torch.ones(2, 2, 3), [1, 3])
    out_MO.backward(torch.ones(1, 1).expand(4, 2))
    assert (x_MI.grad == 2).all()


@pytest.mark.parametrize("version", VERSIONS)
def test_bfloat16(version: str) -> None:
    x_MI, weight_EOI = torch.randn(30, 8).bfloat16(), torch.randn(3, 6, 8).bfloat16()
    out_MO = run(version, x_MI, weight_EOI, [10, 5, 15])
    expected = grouped_linear_reference(x_MI.double(), weight_EOI.double(), [10, 5, 15])
    assert out_MO.dtype == torch.bfloat16
    torch.testing.assert_close(out_MO.double(), expected, rtol=2**-8, atol=1e-2)


@settings(max_examples=30)
@given(COUNTS)
def test_torchs_grouped_product(counts: list[int]) -> None:
    """Widths that it takes, forward and back, with gradients that arrive expanded."""
    x_MI = torch.randn(sum(counts), 8, requires_grad=True)
    weight_EOI = torch.randn(len(counts), 12, 8, requires_grad=True)
    results = []
    for name in ("grouped_mm", "reference"):
        out_MO = run(name, x_MI, weight_EOI, counts)
        grads = torch.autograd.grad(out_MO.sum() * 3, (x_MI, weight_EOI))
        results.append((out_MO, *grads))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
