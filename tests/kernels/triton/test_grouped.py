"""BF16 products of experts in Triton, forward and backward, beside the reference in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.kernels.triton.conftest import ON_GPU
from tests.kernels.triton.near import TOLERANCE, assert_near
from tests.kernels.triton.support import DEVICE, STORAGE, distance
from tests.support import tiny_config
from ziphius.kernels.grouped import grouped_linear_reference, keep_gradient
from ziphius.kernels.select import Kernels, triton_kernels
from ziphius.kernels.triton.grouped import (
    ROWS_CUTS,
    WEIGHTS_CUTS,
    Cut,
    grouped_linear_triton,
    rows_times,
    weight_gradient,
)
from ziphius.model.dispatch import Sent
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.precision import Precision

COUNTS = st.lists(st.sampled_from([0, 0, 1, 3, 63, 64, 65, 130]), min_size=1, max_size=5)
# Every kind of tile: whole ones, a rest, one row, none, none at the end.
SEGMENTS = [0, 200, 1, 128, 0, 65, 0]
# The copy engine's; those that it takes in one direction only; and those that it does not take.
WIDTHS = [(128, 64), (72, 136), (13, 7)]
# Of the norm. Tensor cores cut off where FP32 rounds, and thousands of times for the same side; one
# rounding to BF16 would be 1e-3.
SUMS_IN_FP32 = 1e-4 if ON_GPU else 2e-6


class Operands:
    """Rows, FP32 weights that differ in size between experts, counts and a gradient."""

    def __init__(self, counts: Sequence[int], outer: int, inner: int) -> None:
        generator = torch.Generator().manual_seed(sum(counts) + outer)
        self.counts = list(counts)
        x, w, dout = (
            torch.randn(*shape, generator=generator)
            for shape in (
                (sum(counts), inner),
                (len(counts), outer, inner),
                (sum(counts), outer),
            )
        )
        self.x_MI, self.dout_MO = (t.to(DEVICE, STORAGE) for t in (x, dout))
        self.weight_EOI = (w * torch.arange(1, len(counts) + 1)[:, None, None]).to(DEVICE)
        self.counts_E = torch.tensor(counts, device=DEVICE)

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Result and both gradients in float64, of weights rounded to the rows' dtype."""
        x = self.x_MI.double().requires_grad_()
        weight = self.weight_EOI.to(STORAGE).double().requires_grad_()
        out = grouped_linear_reference(x, weight, self.counts)
        out.backward(self.dout_MO.double())
        return out.detach(), x.grad, weight.grad


def assert_sums(found: Tensor, exact: Tensor) -> None:
    """Weights' gradients are FP32, of rows that were rounded."""
    assert found.shape == exact.shape
    assert (found.double() - exact).norm() <= SUMS_IN_FP32 * exact.norm()


def check(o: Operands) -> None:
    x = o.x_MI.clone().requires_grad_()
    weight = o.weight_EOI.clone().requires_grad_()
    out = grouped_linear_triton(x, weight, o.counts_E)
    out.backward(o.dout_MO)
    exact, dx, dweight = o.exact()
    assert out.dtype == x.grad.dtype == STORAGE
    assert weight.grad.dtype == torch.float32
    start = 0
    # Segment by segment: a small expert's rows would not show in the norm of all.
    for expert, count in enumerate(o.counts):
        part = slice(start, start + count)
        start += count
        assert_near(out.detach()[part], exact[part], STORAGE)
        assert_near(x.grad[part], dx[part], STORAGE)
        assert_sums(weight.grad[expert], dweight[expert])
        assert count or not weight.grad[expert].any()


@settings(max_examples=8, deadline=None)
@given(counts=COUNTS, outer=st.integers(1, 150), inner=st.integers(1, 150))
def test_segments_of_any_length(counts: list[int], outer: int, inner: int) -> None:
    check(Operands(counts, outer, inner))


@pytest.mark.parametrize(("outer", "inner"), WIDTHS)
@pytest.mark.parametrize("counts", [SEGMENTS, [1], [0, 0, 400], [1] * 9], ids=str)
def test_widths(counts: list[int], outer: int, inner: int) -> None:
    check(Operands(counts, outer, inner))


@pytest.mark.skipif(not ON_GPU, reason="too large to be interpreted")
@pytest.mark.parametrize(("outer", "inner"), [(512, 1024), (1024, 256), (1000, 2056)])
def test_sizes_of_training(outer: int, inner: int) -> None:
    check(Operands([1024, 3000, 0, 1, 700, 1111, 64, 640], outer, inner))


@pytest.mark.parametrize("cut", ROWS_CUTS if ON_GPU else ROWS_CUTS[-1:], ids=str)
@pytest.mark.parametrize("turned", [True, False])
def test_every_cut_of_rows(cut: Cut, turned: bool) -> None:
    o = Operands(SEGMENTS, 320 if ON_GPU else 64, 192 if ON_GPU else 136)
    out, dx, _ = o.exact()
    rows, right = (o.x_MI, out) if turned else (o.dout_MO, dx)
    found = rows_times(rows, o.weight_EOI.to(STORAGE), o.counts_E, turned=turned, cut=cut)
    assert_near(found, right, STORAGE)


@pytest.mark.parametrize("cut", WEIGHTS_CUTS if ON_GPU else WEIGHTS_CUTS[-1:], ids=str)
def test_every_cut_of_weights(cut: Cut) -> None:
    o = Operands(SEGMENTS, 136, 200)
    found = torch.full_like(o.weight_EOI, torch.nan)
    weight_gradient(o.dout_MO, o.x_MI, o.counts_E, found, cut=cut)
    assert_sums(found, o.exact()[2])


@pytest.mark.parametrize(("outer", "inner"), WIDTHS)
def test_an_infinity_stays_with_its_expert(outer: int, inner: int) -> None:
    """Blocks of rows and of columns reach into the next expert's, times zero."""
    o = Operands([5, 70, 3], outer, inner)
    x, weight = o.x_MI.clone(), o.weight_EOI.clone()
    x[5:75], weight[1] = torch.inf, torch.nan
    x.requires_grad_()
    weight.requires_grad_()
    out = grouped_linear_triton(x, weight, o.counts_E)
    out.backward(o.dout_MO)
    for found in (out, x.grad):
        assert found[:5].isfinite().all()
        assert found[75:].isfinite().all()
        assert not found[5:75].isfinite().any()
    assert weight.grad[::2].isfinite().all()
    assert not weight.grad[1].isfinite().any()


@pytest.mark.parametrize("counts", [[0], [0, 0, 0]])
def test_no_rows(counts: list[int]) -> None:
    check(Operands(counts, 24, 16))


def test_only_the_gradients_that_are_asked_for() -> None:
    o = Operands([2, 3], 16, 8)
    x = o.x_MI.clone().requires_grad_()
    grouped_linear_triton(x, o.weight_EOI, o.counts_E).sum().backward()
    weight = o.weight_EOI.clone().requires_grad_()
    # A sum's gradient is one number, repeated without memory of its own.
    grouped_linear_triton(o.x_MI, weight, o.counts_E).sum().backward()
    expected = o.x_MI[2:].double().sum(0).expand(16, 8)
    assert_sums(weight.grad[1], expected)
    assert o.weight_EOI.grad is None


def test_rows_and_weights_that_are_turned() -> None:
    o = Operands([4, 9], 24, 16)
    x = o.x_MI.T.contiguous().T.requires_grad_()
    weight = o.weight_EOI.mT.contiguous().mT.requires_grad_()
    out = grouped_linear_triton(x, weight, o.counts_E)
    out.backward(o.dout_MO)
    exact, dx, dweight = o.exact()
    assert_near(out.detach(), exact, STORAGE)
    assert_near(x.grad, dx, STORAGE)
    assert_sums(weight.grad, dweight)


def test_the_gradient_lies_where_the_last_one_lay() -> None:
    o = Operands([4, 0, 9], 24, 16)
    weight = nn.Parameter(o.weight_EOI)
    grouped_linear_triton(o.x_MI, weight, o.counts_E).backward(o.dout_MO)
    where = weight.grad.data_ptr()
    weight.grad.fill_(torch.nan)
    keep_gradient(weight)
    for _ in range(2):
        grouped_linear_triton(o.x_MI, weight, o.counts_E).backward(o.dout_MO)
    assert weight.grad.data_ptr() == where
    assert_sums(weight.grad, 2 * o.exact()[2])


@pytest.mark.parametrize("dtype", [torch.float64] + [torch.float32] * ON_GPU)
def test_what_the_matrix_units_would_round_is_not_theirs(dtype: torch.dtype) -> None:
    o = Operands([4, 0, 9], 24, 16)
    x, weight = o.x_MI.to(dtype), o.weight_EOI.to(dtype)
    out = grouped_linear_triton(x, weight, o.counts_E)
    assert_near(out, grouped_linear_reference(x.double(), weight.double(), o.counts), torch.float32)


def run_experts(version: str, x_ND: Tensor) -> tuple[Tensor, ...]:
    """Return what a mixture's routed experts give, and every gradient."""
    precision = Precision.for_training(STORAGE)
    moe = MixtureOfExperts(tiny_config(), precision, Kernels(grouped=version), DEVICE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*moe.parameters(), *moe.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    x_ND = x_ND.clone().requires_grad_()
    sent = moe.dispatch(x_ND, moe.route(x_ND, None))
    out_ND = moe.combine(moe.run_experts(sent), sent)
    out_ND.backward(x_ND.detach())
    weights = moe.experts.parameters()
    return out_ND.detach(), x_ND.grad, *(weight.grad for weight in weights)


def test_experts_of_a_step_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what the loop makes, whose counts the host has to be told."""
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(30, tiny_config().hidden_size, generator=generator).to(DEVICE, STORAGE)
    expected = run_experts("loop", x_ND)

    def counts(sent: Sent) -> list[int]:
        raise AssertionError("the host asked for counts")

    monkeypatch.setattr(Sent, "counts", property(counts))
    for found, right in zip(run_experts("triton", x_ND), expected, strict=True):
        # Both round: each may be off on its own.
        assert distance(found, right) <= 2 * TOLERANCE[STORAGE]


def test_training_on_gpus_runs_it() -> None:
    assert triton_kernels().function("grouped") is grouped_linear_triton
