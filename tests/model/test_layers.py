"""Linear, RMSNorm and Embedding."""

from __future__ import annotations

import torch

from ziphius.kernels.select import Kernels
from ziphius.model.layers import Embedding, Linear, RMSNorm
from ziphius.model.precision import Precision

BF16 = Precision.for_inference(torch.bfloat16)


def norm(width: int, eps: float, precision: Precision) -> RMSNorm:
    result = RMSNorm(width, eps, precision, Kernels(), None)
    with torch.no_grad():
        result.weight.copy_(torch.linspace(0.5, 2, width))
    return result


def test_rmsnorm_has_its_eps_inside_the_root() -> None:
    """With values as small as eps the place of eps decides (facts 13.12)."""
    x_ND = torch.randn(6, 10, dtype=torch.float64) * 0.1
    subject = norm(10, 1e-2, Precision(torch.float64, torch.float64))
    expected_ND = subject.weight * x_ND / (x_ND.square().mean(-1, keepdim=True) + 1e-2).sqrt()
    torch.testing.assert_close(subject(x_ND), expected_ND)


def test_rmsnorm_is_computed_in_fp32_and_rounded_once() -> None:
    x_ND = (torch.randn(50, 64) * 3).bfloat16()
    subject = norm(64, 1e-6, BF16)
    exact_ND = x_ND.double() / (x_ND.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    result_ND = subject(x_ND)
    assert result_ND.dtype == torch.bfloat16
    # Half a unit in the last of 8 bits, and a little: two roundings would exceed it somewhere.
    error_ND = (result_ND.double() - exact_ND * subject.weight.double()).abs()
    assert (error_ND <= (exact_ND * subject.weight.double()).abs() * 2**-8 * 1.01).all()


def test_linear_has_no_bias_and_multiplies_by_the_transpose() -> None:
    linear = Linear(3, 5, Precision(), Kernels(), None)
    assert [name for name, _ in linear.named_parameters()] == ["weight"]
    with torch.no_grad():
        linear.weight.copy_(torch.arange(15.0).view(5, 3))
    assert linear(torch.tensor([1.0, 10.0, 100.0])).tolist() == [210, 543, 876, 1209, 1542]


def test_linear_computes_in_its_precision() -> None:
    linear = Linear(3, 5, Precision.for_training(torch.bfloat16), Kernels(), None)
    torch.nn.init.normal_(linear.weight)
    assert linear.weight.dtype == torch.float32
    assert linear(torch.randn(2, 3)).dtype == torch.bfloat16


def test_embedding_looks_rows_up() -> None:
    embedding = Embedding(4, 2, BF16, None)
    with torch.no_grad():
        embedding.weight.copy_(torch.arange(8.0).view(4, 2))
    rows = embedding(torch.tensor([[3, 0]]))
    assert rows.tolist() == [[[6, 7], [0, 1]]]
    assert rows.dtype == torch.bfloat16
