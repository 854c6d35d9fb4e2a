"""SwiGLU around FP8: its parts are SwiGLU and the quantisers, and nothing else is kept."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ziphius.kernels.quantize import Fp8, dequantize, quantize_tiles, turn
from ziphius.kernels.swiglu import swiglu_reference
from ziphius.kernels.swiglu_fp8 import TorchSwigluFp8

reference = TorchSwigluFp8()
sizes = given(st.integers(1, 40), st.integers(1, 300), st.booleans(), st.booleans())


def layer(M: int, F: int, weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    gate_MF, up_MF = (torch.randn(M, 2 * F) * 3).bfloat16().chunk(2, -1)
    return gate_MF, up_MF, torch.rand(M) if weighted else None


def same(a: Fp8, b: Fp8) -> bool:
    codes = torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8))
    return codes and torch.equal(a.scales, b.scales) and a.rows == b.rows


@settings(max_examples=30)
@sizes
def test_forward_quantises_the_unrounded_product(
    M: int, F: int, weighted: bool, power_of_two: bool
) -> None:
    gate_MF, up_MF, gates_M = layer(M, F, weighted)
    hidden, gate, up = reference.forward(gate_MF, up_MF, gates_M, power_of_two=power_of_two)
    product_MF = swiglu_reference(gate_MF.float(), up_MF.float(), gates_M)
    assert same(hidden, quantize_tiles(product_MF, power_of_two=power_of_two))
    assert same(gate, quantize_tiles(gate_MF))
    assert same(up, quantize_tiles(up_MF))


def test_a_product_rounded_to_bfloat16_has_other_codes() -> None:
    """The one above would not see it if rounding in between were harmless."""
    gate_MF, up_MF, gates_M = layer(64, 256, True)
    rounded = quantize_tiles(swiglu_reference(gate_MF, up_MF, gates_M))
    assert not same(reference.forward(gate_MF, up_MF, gates_M)[0], rounded)


@settings(max_examples=30)
@sizes
def test_turned_is_the_product_of_what_was_kept(
    M: int, F: int, weighted: bool, power_of_two: bool
) -> None:
    gate_MF, up_MF, gates_M = layer(M, F, weighted)
    _, gate, up = reference.forward(gate_MF, up_MF, gates_M)
    counts_E = torch.tensor([M // 2, 0, M - M // 2])
    product_MF = swiglu_reference(dequantize(gate), dequantize(up), gates_M)
    for counts in (None, counts_E):
        result = reference.turned(gate, up, gates_M, counts, power_of_two=power_of_two)
        assert same(result, turn(product_MF, counts, power_of_two=power_of_two))


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 200), st.booleans())
def test_backward_is_autograds_of_what_was_kept(M: int, F: int, weighted: bool) -> None:
    gate_MF, up_MF, gates_M = layer(M, F, weighted)
    _, gate, up = reference.forward(gate_MF, up_MF, gates_M)
    dhidden_MF, both_M2F = torch.randn(M, F), torch.full((M, 2 * F), float("nan"))
    dgates_M = reference.backward(gate, up, gates_M, dhidden_MF, *both_M2F.chunk(2, -1))
    inputs = [dequantize(q, torch.float64).requires_grad_() for q in (gate, up)]
    if gates_M is not None:
        inputs.append(gates_M.double().requires_grad_())
    swiglu_reference(*inputs).backward(dhidden_MF.double())
    results = [*both_M2F.chunk(2, -1), *([] if dgates_M is None else [dgates_M])]
    for result, exact in zip(results, inputs, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_gradients_are_rounded_once_to_what_they_are_written_into() -> None:
    gate_MF, up_MF, gates_M = layer(9, 130, True)
    _, gate, up = reference.forward(gate_MF, up_MF, gates_M)
    dhidden_MF = torch.randn(9, 130).bfloat16()
    wide, narrow = torch.empty(2, 9, 130), torch.empty(2, 9, 130, dtype=torch.bfloat16)
    for out in (wide, narrow):
        reference.backward(gate, up, gates_M, dhidden_MF, *out)
    assert torch.equal(narrow, wide.bfloat16())


def test_what_is_kept_takes_half_of_bfloat16_and_scales() -> None:
    gate_MF, up_MF, _ = layer(128, 512, False)
    _, gate, up = reference.forward(gate_MF, up_MF, None)
    assert gate.nbytes + up.nbytes <= 0.52 * (gate_MF.nbytes + up_MF.nbytes)
