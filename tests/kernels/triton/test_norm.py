"""RMSNorm: near the reference in FP64; its tiles are those of the norm, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.triton.support import DEVICE, ON_GPU, STORAGE, assert_same, distance, on_cpu
from ziphius.kernels import norm
from ziphius.kernels.quantize import quantize_tiles
from ziphius.kernels.triton import norm as norm_kernels
from ziphius.kernels.triton.norm import norm_backward_triton, norm_tiles_triton, rms_norm_triton

few = settings(max_examples=40 if ON_GPU else 12)
# One rounding of a result; FP32 within.
CLOSE = 2**-8 if ON_GPU else 2**-21
EPS = 1e-6


def layer(M: int, D: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw input, weight and the gradient that arrives."""
    generator = torch.Generator().manual_seed(seed)
    x, dout = torch.randn(2, M, D, generator=generator).to(STORAGE).to(DEVICE)
    weight = torch.rand(D, generator=generator) + 0.5
    return x * 3, weight.to(DEVICE), dout


@few
@given(st.integers(1, 40), st.integers(1, 700), st.booleans(), st.integers(0, 10**6))
def test_value_and_tiles(M: int, D: int, power_of_two: bool, seed: int) -> None:
    x, weight, _ = layer(M, D, seed)
    value, q, inverse_root = norm_tiles_triton(x, weight, EPS, power_of_two=power_of_two)
    exact, _, exact_root = norm.norm_tiles_reference(on_cpu(x).double(), on_cpu(weight), EPS)
    assert (value.dtype, inverse_root.dtype) == (x.dtype, torch.float32)
    assert inverse_root.shape == (M, 1)
    assert distance(value, exact) < CLOSE
    assert distance(inverse_root, exact_root) < 2**-21
    assert distance(rms_norm_triton(x, weight, EPS), value) < CLOSE
    assert_same(q, quantize_tiles(on_cpu(value), power_of_two=power_of_two))


@few
@given(st.integers(1, 40), st.integers(1, 700), st.integers(0, 10**6))
def test_gradients(M: int, D: int, seed: int) -> None:
    x, weight, dout = layer(M, D, seed)
    x.requires_grad_()
    weight.requires_grad_()
    rms_norm_triton(x, weight, EPS).backward(dout)
    exact_x = on_cpu(x.detach()).double().requires_grad_()
    exact_weight = on_cpu(weight.detach()).double().requires_grad_()
    norm.rms_norm_reference(exact_x, exact_weight, EPS).backward(on_cpu(dout).double())
    assert (x.grad.dtype, weight.grad.dtype) == (STORAGE, torch.float32)
    # In a row of one number the gradient's two terms cancel, and rounding stays.
    inverse_root = norm.norm_tiles_reference(exact_x, exact_weight, EPS)[2]
    terms = float((on_cpu(dout).double() * exact_weight * inverse_root).detach().norm())
    error = float((on_cpu(x.grad).double() - exact_x.grad).norm())
    assert error < CLOSE * float(exact_x.grad.norm()) + 2**-20 * terms
    assert distance(weight.grad, exact_weight.grad) < 2**-20


@pytest.mark.parametrize("shares", [1, 3])
def test_few_programs_sum_many_rows(shares: int) -> None:
    launch = norm_kernels.BackwardLaunch(1, 4, shares)
    x, weight, dout = layer(50, 130, 1)
    inverse_root = norm_tiles_triton(x, weight, EPS)[2]
    results = norm_backward_triton(x, weight, inverse_root, dout, launch=launch)
    arguments = (on_cpu(t).double() for t in (x, weight, inverse_root, dout))
    for result, exact in zip(results, norm.norm_backward_reference(*arguments), strict=True):
        assert distance(result, exact) < CLOSE * 4
    again = norm_backward_triton(x, weight, inverse_root, dout, launch=launch)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


def test_rows_that_lie_apart() -> None:
    """The norms of MLA read a part of a wider product's columns."""
    whole, weight, dout = layer(6, 300, 2)
    x, weight, dout = whole.view(2, 3, 300)[..., 40:240], weight[:200], dout.view(2, 3, 300)
    dout = dout[..., 7:207]
    value, q, inverse_root = norm_tiles_triton(x, weight, EPS)
    assert (value.shape, q.scales.shape, inverse_root.shape) == ((2, 3, 200), (2, 3, 2), (2, 3, 1))
    joined = norm_tiles_triton(x.contiguous(), weight, EPS)
    assert torch.equal(value, joined[0])
    assert_same(q, joined[1])
    apart = norm_backward_triton(x, weight, inverse_root, dout)
    together = norm_backward_triton(x.contiguous(), weight, inverse_root, dout.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def test_a_rows_norm_does_not_depend_on_how_many_there_are() -> None:
    x, weight, _ = layer(33, 200, 3)
    assert torch.equal(rms_norm_triton(x, weight, EPS)[7:8], rms_norm_triton(x[7:8], weight, EPS))


def test_no_rows_and_rows_of_zeros() -> None:
    x, weight, dout = layer(0, 100, 4)
    value, q, inverse_root = norm_tiles_triton(x, weight, EPS)
    assert (value.shape, q.codes.shape, inverse_root.shape) == ((0, 100), (0, 100), (0, 1))
    dx, dweight = norm_backward_triton(x, weight, inverse_root, dout)
    assert dx.shape == (0, 100)
    assert not dweight.any()
    x = torch.zeros(2, 100, dtype=STORAGE, device=DEVICE, requires_grad=True)
    out = rms_norm_triton(x, weight, EPS)
    out.sum().backward()
    assert not out.any()
    assert x.grad.isfinite().all()


def test_gradients_that_arrive_expanded() -> None:
    x, weight, _ = layer(4, 30, 5)
    x.requires_grad_()
    rms_norm_triton(x, weight, EPS).sum().backward()
    exact = on_cpu(x.detach()).double().requires_grad_()
    norm.rms_norm_reference(exact, on_cpu(weight).double(), EPS).sum().backward()
    assert distance(x.grad, exact.grad) < CLOSE * 4


@pytest.mark.skipif(not ON_GPU, reason="the interpreter is too slow for layers of real sizes")
@pytest.mark.parametrize("D", [512, 1536, 7168])
def test_sizes_of_the_report(D: int) -> None:
    x, weight, dout = layer(4096, D, 6)
    value, q, inverse_root = norm_tiles_triton(x, weight, EPS)
    exact = norm.rms_norm_reference(on_cpu(x).double(), on_cpu(weight).double(), EPS)
    assert distance(value, exact) < CLOSE
    assert_same(q, quantize_tiles(on_cpu(value)))
    results = norm_backward_triton(x, weight, inverse_root, dout)
    arguments = (on_cpu(t).double() for t in (x, weight, inverse_root, dout))
    for result, wanted in zip(results, norm.norm_backward_reference(*arguments), strict=True):
        assert distance(result, wanted) < CLOSE
