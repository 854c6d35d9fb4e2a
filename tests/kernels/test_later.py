"""The queue of weight gradients: order, names, and what it holds."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from ziphius.kernels.later import Later
from ziphius.kernels.linear import linear_native


def backward(later: Later, name: str, weight: nn.Parameter, x: torch.Tensor) -> None:
    with later.open(name):
        linear_native(x, weight, x.dtype, later).sum().backward()


def test_the_oldest_comes_first() -> None:
    later, weight = Later(), nn.Parameter(torch.zeros(2, 3))
    for name in "abc":
        backward(later, name, weight, torch.randn(4, 3))
    assert len(later) == 3
    with pytest.raises(ValueError, match="weight gradients of b: those of a have waited longest"):
        later.run("b")
    for name in "abc":
        later.run(name)
    with pytest.raises(ValueError, match="none"):
        later.run("a")


def test_gradients_add_up() -> None:
    later, weight = Later(), nn.Parameter(torch.zeros(2, 3))
    inputs = [torch.randn(4, 3) for _ in range(3)]
    for name, x in zip("abc", inputs, strict=True):
        backward(later, name, weight, x)
    assert weight.grad is None
    expected = torch.zeros(2, 3)
    for name, x in zip("abc", inputs, strict=True):
        later.run(name)
        expected += x.sum(0)
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, expected)


def test_sums_of_bfloat16_products_are_in_fp32() -> None:
    later, weight = Later(), nn.Parameter(torch.zeros(1, 1))
    for step in range(300):
        backward(later, str(step), weight, torch.ones(1, 1, dtype=torch.bfloat16))
        later.run(str(step))
    assert weight.grad is not None
    assert weight.grad.item() == 300  # BF16 would stay at 256


def test_what_a_pass_held_is_free_behind_it() -> None:
    later, weight = Later(), nn.Parameter(torch.zeros(2, 3))
    x = torch.randn(4, 3)
    held = weakref.ref(x)
    backward(later, "a", weight, x)
    del x
    assert held() is not None
    later.run("a")
    assert held() is None


def test_a_weight_that_is_no_leaf_does_not_wait() -> None:
    later, weight = Later(), nn.Parameter(torch.ones(2, 3))
    with later.open("a"):
        linear_native(torch.ones(4, 3), weight * 2, torch.float32, later).sum().backward()
    assert weight.grad is not None
    later.run("a")
    assert torch.equal(weight.grad, torch.full((2, 3), 8.0))


def test_a_pass_that_fails_leaves_nothing() -> None:
    later = Later()
    with pytest.raises(RuntimeError), later.open("a"):
        raise RuntimeError
    assert not len(later)
    with later.open("b"):
        pass
    later.drop()
    assert not len(later)
