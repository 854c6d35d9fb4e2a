"""SwiGLU around FP8: the inputs' tiles are exact, the rest is near the reference in FP64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.triton.support import DEVICE, ON_GPU, STORAGE, assert_same, distance, on_cpu
from ziphius.kernels.quantize import TILE, Fp8, dequantize, quantize_tiles, turn
from ziphius.kernels.swiglu import swiglu_gradients, swiglu_reference
from ziphius.kernels.swiglu_fp8 import TorchSwigluFp8
from ziphius.kernels.triton.swiglu_fp8 import CANDIDATES, Launch, TritonSwigluFp8

ours = TritonSwigluFp8()
few = settings(max_examples=40 if ON_GPU else 10)
rows, columns, seeds = st.integers(1, 150), st.integers(1, 300), st.integers(0, 10**6)
CLOSE = 2**-8 if ON_GPU else 2**-20


def layer(M: int, F: int, weighted: bool, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw gate, up (halves of one product) and routing weights."""
    generator = torch.Generator().manual_seed(seed)
    both = (torch.randn(M, 2 * F, generator=generator) * 3).to(STORAGE).to(DEVICE)
    gates_M = torch.rand(M, generator=generator).to(DEVICE) if weighted else None
    return both[:, :F], both[:, F:], gates_M


def kept(M: int, F: int, weighted: bool, seed: int) -> tuple[Fp8, Fp8, Tensor | None]:
    gate_MF, up_MF, gates_M = layer(M, F, weighted, seed)
    gate, up = (quantize_tiles(on_cpu(x)) for x in (gate_MF, up_MF))
    return to_device(gate), to_device(up), gates_M


def to_device(q: Fp8) -> Fp8:
    return Fp8(q.codes.to(DEVICE), q.scales.to(DEVICE))


def assert_near(result: Fp8, expected: Fp8, *, power_of_two: bool = False) -> None:
    """Codes are at most one step apart, and few of them: a last bit of a sigmoid decides a tie.

    A scale that is a power of two may be twice the other beside the next one: such groups are few.
    """
    result = on_cpu_fp8(result)
    same = torch.ones_like(expected.scales, dtype=torch.bool)
    if power_of_two:
        same = result.scales == expected.scales
        assert (result.scales.frexp().mantissa == 0.5).all()
        assert (~same).sum() <= 1 + 1e-3 * same.numel()
    else:
        torch.testing.assert_close(result.scales, expected.scales, rtol=2**-18, atol=0)
    apart = (_ordered(result.codes) - _ordered(expected.codes)).abs()
    apart = apart * same.repeat_interleave(TILE, -1)[..., : apart.shape[-1]]
    assert apart.max() <= 1
    assert apart.sum() <= 1 + 1e-3 * apart.numel()


def on_cpu_fp8(q: Fp8) -> Fp8:
    return Fp8(q.codes.cpu(), q.scales.cpu())


def _ordered(codes: Tensor) -> Tensor:
    """Number the codes in the order of their values."""
    raw = codes.cpu().view(torch.uint8).int()
    return torch.where(raw >= 128, 128 - raw, raw)


@few
@given(rows, columns, st.booleans(), st.booleans(), seeds)
def test_forward(M: int, F: int, weighted: bool, power_of_two: bool, seed: int) -> None:
    gate_MF, up_MF, gates_M = layer(M, F, weighted, seed)
    assert gate_MF.stride(0) == 2 * F
    hidden, gate, up = ours.forward(gate_MF, up_MF, gates_M, power_of_two=power_of_two)
    assert_same(gate, quantize_tiles(on_cpu(gate_MF)))
    assert_same(up, quantize_tiles(on_cpu(up_MF)))
    exact = swiglu_reference(*(_double(x) for x in (gate_MF, up_MF, gates_M)))
    expected = quantize_tiles(exact, power_of_two=power_of_two)
    assert_near(hidden, expected, power_of_two=power_of_two)


@few
@given(rows, columns, st.booleans(), st.booleans(), seeds)
def test_turned(M: int, F: int, weighted: bool, power_of_two: bool, seed: int) -> None:
    gate, up, gates_M = kept(M, F, weighted, seed)
    counts = [None, [M], [0, M // 3, 0, M - M // 3, 0]][seed % 3]
    counts_E = None if counts is None else torch.tensor(counts, device=DEVICE)
    result = ours.turned(gate, up, gates_M, counts_E, power_of_two=power_of_two)
    inputs = (dequantize(on_cpu_fp8(q), torch.float64) for q in (gate, up))
    exact = swiglu_reference(*inputs, _double(gates_M))
    expected = turn(exact, on_cpu(counts_E), power_of_two=power_of_two)
    assert_near(result, expected, power_of_two=power_of_two)


@few
@given(rows, columns, st.booleans(), seeds)
def test_backward(M: int, F: int, weighted: bool, seed: int) -> None:
    gate, up, gates_M = kept(M, F, weighted, seed)
    dhidden_MF = torch.randn(M, F).to(STORAGE).to(DEVICE)
    out = torch.full((M, 2 * F), float("nan"), dtype=STORAGE, device=DEVICE)
    dgates_M = ours.backward(gate, up, gates_M, dhidden_MF, out[:, :F], out[:, F:])
    inputs = (dequantize(on_cpu_fp8(q), torch.float64) for q in (gate, up))
    exact = swiglu_gradients(*inputs, _double(gates_M), _double(dhidden_MF))
    assert distance(out[:, :F], exact[0]) < CLOSE
    assert distance(out[:, F:], exact[1]) < CLOSE
    if gates_M is None:
        assert dgates_M is None
    else:
        assert dgates_M.dtype == torch.float32
        assert distance(dgates_M, exact[2]) < 2**-18


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else on_cpu(x).double()


@pytest.mark.parametrize("launch", CANDIDATES)
def test_every_candidate_of_a_launch(launch: Launch) -> None:
    candidate = TritonSwigluFp8(launch)
    gate_MF, up_MF, gates_M = layer(30, 1100, True, 1)
    for result, expected in zip(
        candidate.forward(gate_MF, up_MF, gates_M),
        ours.forward(gate_MF, up_MF, gates_M),
        strict=True,
    ):
        assert_same(result, expected)
    gate, up, gates_M = kept(30, 1100, True, 1)
    dhidden_MF = torch.randn(30, 1100).to(STORAGE).to(DEVICE)
    outputs = [torch.empty(2, 30, 1100, dtype=STORAGE, device=DEVICE) for _ in range(2)]
    dgates = [
        version.backward(gate, up, gates_M, dhidden_MF, *out)
        for version, out in zip((ours, candidate), outputs, strict=True)
    ]
    assert torch.equal(*outputs)
    assert distance(*dgates) < 2**-18


def test_no_rows() -> None:
    gate_MF, up_MF, gates_M = layer(0, 200, True, 0)
    hidden, gate, up = ours.forward(gate_MF, up_MF, gates_M)
    assert hidden.codes.shape == (0, 200)
    counts_E = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    turned = ours.turned(gate, up, gates_M, counts_E)
    expected = TorchSwigluFp8().turned(gate, up, gates_M, counts_E)
    assert_same(turned, expected)
    dgates_M = ours.backward(gate, up, gates_M, gate_MF, gate_MF.clone(), up_MF.clone())
    assert dgates_M.shape == (0,)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_seen() -> None:
    gate_MF, up_MF, gates_M = layer(3, 200, True, 2)
    gate_MF[1, 5], up_MF[2, 150] = float("nan"), float("inf")
    for q in ours.forward(gate_MF, up_MF, gates_M):
        assert q.scales[0].isfinite().all()
    hidden, gate, up = ours.forward(gate_MF, up_MF, gates_M)
    assert not hidden.scales[1, 0].isfinite()
    assert not hidden.scales[2, 1].isfinite()
    assert not gate.scales[1, 0].isfinite()
    assert not up.scales[2, 1].isfinite()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_large_gates_saturate_and_do_not_overflow() -> None:
    """The sigmoid of -200 is zero, though the exponential in it is infinite."""
    gate_MF = torch.tensor([[-200.0, 200.0, -90.0, 0.0]], device=DEVICE).to(STORAGE)
    up_MF = torch.ones_like(gate_MF)
    hidden = ours.forward(gate_MF, up_MF, None)[0]
    assert dequantize(on_cpu_fp8(hidden)).tolist() == [[0.0, 200.0, 0.0, 0.0]]


@pytest.mark.skipif(not ON_GPU, reason="the interpreter is too slow for layers of real sizes")
def test_sizes_of_the_report() -> None:
    gate_MF, up_MF, gates_M = layer(8192, 2048, True, 3)
    hidden, gate, up = ours.forward(gate_MF, up_MF, gates_M)
    assert_same(gate, quantize_tiles(on_cpu(gate_MF)))
    exact = swiglu_reference(*(_double(x) for x in (gate_MF, up_MF, gates_M)))
    assert_near(hidden, quantize_tiles(exact))
    counts_E = torch.tensor([5000, 0, 3192], device=DEVICE)
    inputs = (dequantize(on_cpu_fp8(q), torch.float64) for q in (gate, up))
    again = swiglu_reference(*inputs, _double(gates_M))
    assert_near(ours.turned(gate, up, gates_M, counts_E), turn(again, on_cpu(counts_E)))
