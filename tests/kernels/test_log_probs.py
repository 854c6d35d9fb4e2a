"""Log-probabilities of a linear head, chunk by chunk, beside torch's log-softmax."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ziphius.kernels.log_probs import WholeSoftmax, linear_log_probs
from ziphius.kernels.loss import (
    IGNORED,
    cross_entropy_rows,
    cross_entropy_rows_compiled,
    linear_cross_entropy,
)


def operands(
    N: int, D: int, V: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets_N = torch.randint(-1, V, (N,), generator=generator)
    targets_N[targets_N < 0] = IGNORED
    return (
        hidden_ND.to(dtype).requires_grad_(),
        weight_VD.to(dtype).requires_grad_(),
        targets_N,
    )


def by_torch(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor):
    counted_N = targets_N != IGNORED
    log_NV = (hidden_ND @ weight_VD.T).log_softmax(-1)
    found_N = log_NV.gather(1, targets_N.where(counted_N, 0)[:, None]).squeeze(1)
    return found_N.masked_fill(~counted_N, 0)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(2, 13), st.integers(1, 10))
def test_values_and_gradients_are_torchs(N: int, D: int, V: int, chunk: int) -> None:
    hidden_ND, weight_VD, targets_N = operands(N, D, V)
    pull_N = torch.linspace(-2, 3, N, dtype=torch.float64)
    expected_N = by_torch(hidden_ND, weight_VD, targets_N)
    expected = torch.autograd.grad(expected_N @ pull_N, (hidden_ND, weight_VD))
    found_N = linear_log_probs(hidden_ND, weight_VD, targets_N, chunk)
    found = torch.autograd.grad(found_N @ pull_N, (hidden_ND, weight_VD))
    torch.testing.assert_close(found_N, expected_N)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_by_finite_differences() -> None:
    hidden_ND, weight_VD, targets_N = operands(5, 3, 7)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_log_probs(h, w, targets_N, 2), (hidden_ND, weight_VD)
    )


def test_their_sum_is_the_cross_entropy() -> None:
    hidden_ND, weight_VD, targets_N = operands(20, 6, 30)
    total = -linear_log_probs(hidden_ND, weight_VD, targets_N, 7).sum()
    torch.testing.assert_close(total, linear_cross_entropy(hidden_ND, weight_VD, targets_N, 7))


def test_ignored_rows_are_zero_and_have_no_gradient() -> None:
    hidden_ND, weight_VD, _ = operands(4, 3, 5)
    found_N = linear_log_probs(hidden_ND, weight_VD, torch.full((4,), IGNORED))
    found_N.sum().backward()
    assert not found_N.any()
    assert hidden_ND.grad is not None
    assert not hidden_ND.grad.any()


@pytest.mark.parametrize("widened", [False, True])
def test_bf16_gives_fp32_near_the_truth(widened: bool) -> None:
    hidden_ND, weight_VD, targets_N = operands(64, 16, 50, torch.bfloat16)
    found_N = linear_log_probs(hidden_ND, weight_VD, targets_N, 32, widened=widened)
    found_N.sum().backward()
    assert found_N.dtype == torch.float32
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.dtype == torch.bfloat16
    expected_N = by_torch(hidden_ND.detach().double(), weight_VD.detach().double(), targets_N)
    # Rounded logits are off by 2^-9 of their size, about 10; widened ones by FP32's rounding.
    bound = 1e-5 if widened else 0.1
    assert (found_N.detach().double() - expected_N).abs().max() < bound


@pytest.mark.parametrize("version", ["torch", "compiled"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_gradients_are_near_the_truth_in_every_version(
    version: str, dtype: torch.dtype, bound: float, request: pytest.FixtureRequest
) -> None:
    """By the largest number of each gradient; rows that do not count have none."""
    rows_loss = cross_entropy_rows
    if version == "compiled":
        library = request.getfixturevalue("library")
        rows_loss = partial(cross_entropy_rows_compiled, library)
    hidden_ND, weight_VD, targets_N = operands(200, 16, 300, dtype)
    targets_N[::3] = IGNORED
    pull_N = torch.linspace(-2, 3, 200)
    softmax = WholeSoftmax(rows_loss)
    found_N = linear_log_probs(hidden_ND, weight_VD, targets_N, 64, softmax=softmax)
    found = torch.autograd.grad(found_N @ pull_N, (hidden_ND, weight_VD))
    exact = [x.detach().double().requires_grad_() for x in (hidden_ND, weight_VD)]
    expected_N = by_torch(*exact, targets_N)
    expected = torch.autograd.grad(expected_N @ pull_N.double(), exact)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.double() - theirs).abs().max() < bound * theirs.abs().max()
    assert not found[0][::3].any()


def test_products_have_few_sizes_however_many_rows_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries keep a program for every size: memory grew by megabytes a step of GRPO."""
    sizes, plain = set(), torch.mm

    def mm(rows: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        sizes.add(len(rows))
        return plain(rows, other, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    hidden_ND, weight_VD, _ = operands(300, 4, 9)
    for counted in range(0, 300, 7):
        targets_N = torch.full((300,), IGNORED)
        targets_N[:counted] = 1
        linear_log_probs(hidden_ND, weight_VD, targets_N, 1024).sum().backward()
    assert sizes == {128, 256, 384}
