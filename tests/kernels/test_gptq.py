"""GPTQ against rounding: equal where inputs are independent, far better where they are not."""

import math

import pytest
import torch
from torch import Tensor

from ziphius.kernels.gptq import quantize_gptq
from ziphius.kernels.integers import dequantize, quantize

WIDTH = 96


def weight(width: int = WIDTH) -> Tensor:
    return torch.randn(40, width, generator=torch.Generator().manual_seed(1))


def correlated(width: int = WIDTH, rows: int = 400) -> Tensor:
    """Inputs that lie near a space of few dimensions, some of them much larger than others."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(12, width, generator=generator)
    noise = 0.1 * torch.randn(rows, width, generator=generator)
    sizes = torch.exp(torch.randn(width, generator=generator))
    return (torch.randn(rows, 12, generator=generator) @ mixing + noise) * sizes


def output_error(x: Tensor, w: Tensor, codes: tuple[Tensor, Tensor], size: int) -> float:
    back = dequantize(*codes, size, torch.float64)
    y = x.double() @ w.double().T
    return float((x.double() @ back.T - y).norm() / y.norm())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("size", [-1, 7, 16, 32, 300])
@pytest.mark.parametrize("bits", [4, 8])
def test_with_independent_inputs_it_is_rounding(bits: int, size: int, act_order: bool) -> None:
    w = weight()
    expected = quantize(w, bits, size)
    codes = quantize_gptq(w, 3 * torch.eye(WIDTH), bits, size, act_order=act_order)
    assert torch.equal(codes.codes_OI, expected.codes_OI)
    assert torch.equal(codes.scales_OG, expected.scales_OG)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("size", [-1, 7, 16, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_with_correlated_inputs_the_outputs_err_far_less(
    bits: int, size: int, act_order: bool
) -> None:
    w, x = weight(), correlated()
    rounded = output_error(x, w, quantize(w, bits, size), size)
    found = quantize_gptq(w, x.T @ x, bits, size, act_order=act_order)
    assert output_error(x, w, found, size) < 0.6 * rounded


def test_it_also_holds_on_inputs_that_were_not_seen() -> None:
    w, x = weight(), correlated(rows=3000)
    found = quantize_gptq(w, x[:2000].T @ x[:2000], 4, 32)
    rounded = output_error(x[2000:], w, quantize(w, 4, 32), 32)
    assert output_error(x[2000:], w, found, 32) < 0.6 * rounded


def test_blocks_change_nothing_but_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(), correlated()
    one = quantize_gptq(w, x.T @ x, 4, 16)
    monkeypatch.setattr("ziphius.kernels.gptq._BLOCK", 16)
    other = quantize_gptq(w, x.T @ x, 4, 16)
    assert (one.codes_OI != other.codes_OI).float().mean() < 0.01


def test_inputs_that_are_always_zero_are_rounded() -> None:
    w, x = weight(), correlated()
    x[:, 5] = 0
    x[:, 80:] = 0
    codes = quantize_gptq(w, x.T @ x, 4, 16)
    expected = quantize(w, 4, 16)
    assert torch.equal(codes.codes_OI[:, 80:], expected.codes_OI[:, 80:])
    assert output_error(x, w, codes, 16) < 0.6 * output_error(x, w, expected, 16)


def test_fewer_rows_than_inputs_need_damping() -> None:
    w, x = weight(), correlated(rows=3)
    found = quantize_gptq(w, x.T @ x, 4, 16)
    assert output_error(x, w, found, 16) < output_error(x, w, quantize(w, 4, 16), 16)
    with pytest.raises(ValueError, match="raise the damping"):
        quantize_gptq(w, x.T @ x, 4, 16, damping=0.0)


def test_no_rows_at_all_are_rounding() -> None:
    w = weight()
    codes = quantize_gptq(w, torch.zeros(WIDTH, WIDTH), 4, 16)
    assert torch.equal(codes.codes_OI, quantize(w, 4, 16).codes_OI)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_refused(bad: float) -> None:
    hessian = torch.eye(WIDTH)
    hessian[3, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_gptq(weight(), hessian, 4, 16)
