"""Whole squares give the bits of the reference too, of any magnitudes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.triton.support import DEVICE, ON_GPU, assert_same, on_cpu
from tests.kernels.triton.test_bits import codes_of, hard_quotients
from tests.kernels.triton.test_quantize import numbers, reference, segments
from tests.kernels.triton.test_swiglu_fp8 import assert_near, kept, on_cpu_fp8
from ziphius.kernels.quantize import Fp8, dequantize, scales_of, turn
from ziphius.kernels.swiglu import swiglu_reference
from ziphius.kernels.swiglu_fp8 import TorchSwigluFp8
from ziphius.kernels.triton.quantize import TritonQuantize
from ziphius.kernels.triton.squares import BOTH, TURN
from ziphius.kernels.triton.swiglu_fp8 import TritonSwigluFp8
from ziphius.kernels.triton.units import SMALLER

WIDTH = 256
ours = TritonQuantize()
powers = pytest.mark.parametrize("power_of_two", [False, True])


def matrix(M: int, seed: int) -> Tensor:
    """Draw numbers of BF16, on a processor too: units are loaded as integers."""
    return numbers(M, WIDTH, seed=seed, dtype=torch.bfloat16)


def moved(q: Fp8) -> Fp8:
    return Fp8(q.codes.to(DEVICE), q.scales.to(DEVICE))


def check(x: Tensor, counts_E: Tensor | None, power_of_two: bool) -> None:
    """Compare every quantiser of whole squares."""
    assert BOTH.fits(x)
    tiles, turned = reference.both(on_cpu(x), on_cpu(counts_E), power_of_two=power_of_two)
    assert_same(ours.turn(x, counts_E, power_of_two=power_of_two), turned)
    found = ours.both(x, counts_E, power_of_two=power_of_two)
    assert_same(found[0], tiles)
    assert_same(found[1], turned)
    again = reference.regroup(tiles, on_cpu(counts_E), power_of_two=power_of_two)
    assert_same(ours.regroup(moved(tiles), counts_E, power_of_two=power_of_two), again)


@pytest.mark.parametrize(
    ("power_of_two", "M", "E"), [(False, 40, 0), (True, 60, 2), (False, 130, 1)]
)
def test_quantisers(power_of_two: bool, M: int, E: int) -> None:
    check(matrix(M, E), segments(M, E, E) if E else None, power_of_two)


@settings(max_examples=40 if ON_GPU else 5)
@given(st.integers(1, 130), st.floats(-30, 38), st.booleans(), st.integers(0, 10**6))
def test_any_magnitude(M: int, power: float, power_of_two: bool, seed: int) -> None:
    """Columns up to the largest numbers of BF16 that dequantise to finite ones, and down."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(M, 128, generator=generator) * 2 - 1
    x *= 10 ** (power - 8 * torch.rand(128, generator=generator))
    check(x.to(torch.bfloat16).to(DEVICE), None, power_of_two)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@powers
def test_what_is_not_finite(bad: float, power_of_two: bool) -> None:
    x = matrix(70, 3)
    x[2, 130], x[69, 255], x[5] = bad, bad, -0.0
    check(x, None, power_of_two)
    assert not ours.turn(x, power_of_two=power_of_two).scales.isfinite().all()


def test_rows_that_lie_apart() -> None:
    view = numbers(130, 2 * WIDTH, seed=4, dtype=torch.bfloat16)[:, WIDTH // 2 : 3 * WIDTH // 2]
    check(view, None, False)


@pytest.mark.parametrize("columns", [slice(4, 260), slice(0, 200)])
def test_what_does_not_fit_goes_the_other_way(columns: slice) -> None:
    """Addresses that are no multiples of 16 bytes, and widths that are none of a square."""
    view = numbers(130, 512, seed=4, dtype=torch.float32)[:, columns]
    assert not TURN.fits(view.to(torch.bfloat16)[:, 1:])
    assert_same(ours.turn(view), reference.turn(on_cpu(view)))


@pytest.mark.parametrize(("weighted", "power_of_two"), [(True, False), (False, True), (True, True)])
def test_product_turned_again(weighted: bool, power_of_two: bool) -> None:
    M = 60
    gate, up, gates_M = kept(M, WIDTH, weighted, 5)
    counts_E = torch.tensor([M // 3, M - M // 3], device=DEVICE)
    result = TritonSwigluFp8().turned(gate, up, gates_M, counts_E, power_of_two=power_of_two)
    expected = turn(_product(gate, up, gates_M), counts_E.cpu(), power_of_two=power_of_two)
    assert_near(result, expected, power_of_two=power_of_two)


def _product(gate: Fp8, up: Fp8, gates_M: Tensor | None) -> Tensor:
    wide = (dequantize(on_cpu_fp8(q), torch.float64) for q in (gate, up))
    return swiglu_reference(*wide, None if gates_M is None else gates_M.cpu().double())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("width", [WIDTH, 200])
@pytest.mark.parametrize("powers", [(100, 24), (24, 100), (119, 3), (119, 119), (64, 64), (2, 119)])
def test_product_of_large_scales(powers: tuple[int, int], width: int) -> None:
    """Zeros stay zeros, and what is finite in FP32 stays so, whatever a row's scales are."""
    gate, up, gates_M = kept(70, width, True, 6)
    gate, up = (
        Fp8(q.codes, torch.full_like(q.scales, 2.0**power))
        for q, power in zip((gate, up), powers, strict=True)
    )
    codes = up.codes.view(torch.uint8)
    codes[:, ::3] = 0  # no product
    codes[:, 1::3] &= 0x83  # small ones
    gates_M[:9] = 0
    result = on_cpu_fp8(TritonSwigluFp8().turned(gate, up, gates_M))
    expected = turn(_product(gate, up, gates_M))
    in_fp32 = TorchSwigluFp8().turned(on_cpu_fp8(gate), on_cpu_fp8(up), on_cpu(gates_M))
    finite = in_fp32.scales.isfinite().flatten()
    assert finite.sum() >= width // 3
    assert not result.scales[expected.scales.isinf()].isfinite().any()
    assert_near(*(Fp8(q.codes[finite], q.scales[finite]) for q in (result, expected)))


@pytest.mark.parametrize("places", range(-2, 3))
@pytest.mark.parametrize("power", [0, 90, 95])
def test_a_reciprocal_in_two_parts_divides_as_a_division(places: int, power: int) -> None:
    """What the kernels compute on a GPU, here, of the hardest quotients, with large scales too.

    The GPU's own reciprocal may be off by some last places. FP64 holds the terms; their sum is
    made of integers, which hold it too.
    """
    x, scale = (t.double() * 2.0**power for t in hard_quotients())
    expected = codes_of((x / scale).float())
    assert torch.equal(codes_of(_quotient(x, scale, SMALLER.value, places)), expected)
    # Scales are 2^23 more: a rest without 24 bits is not enough of some.
    assert torch.equal(codes_of(_quotient(x, scale, 1.0, places)), expected) == (power == 0)


@pytest.mark.parametrize("places", range(-2, 3))
def test_of_bf16_the_rest_may_be_below_the_normal_numbers(places: int) -> None:
    """Every number of every group of BF16 with a scale above 2^105, down to codes of zero."""
    mantissa = torch.arange(128, 256).double() / 128
    for power in range(113, 128):
        scale = scales_of(mantissa * 2.0**power, power_of_two=False).double()
        x = (mantissa[:, None] * 2.0 ** (power - torch.arange(21))).flatten()
        x = x.expand(128, -1)
        quotient = _quotient(x, scale[:, None], 1.0, places)
        right = codes_of(quotient) == codes_of((x / scale[:, None]).float())
        assert (right | (x > mantissa[:, None] * 2.0**power)).all()


def _quotient(x: Tensor, scale: Tensor, times: float, places: int) -> Tensor:
    """Divide as ``divided`` does by the parts of ``reciprocal``."""
    x, scale = x * times, scale * times
    near = ((1 / scale).float().view(torch.int32) + places).view(torch.float32).double()
    off = (1 - scale * near).float().double()
    first = _chopped(near, off)
    rest = ((1 - scale * first).float().double() * first).float().double()
    assert (rest >= 0).all()
    return _rounded_sum(x * first, (x * rest).float().double())


def _chopped(near: Tensor, off: Tensor) -> Tensor:
    """Return ``near + off * near`` in FP32, towards zero: the terms have 48 bits."""
    nearest = (near + off * near).float()
    over = nearest.double() - near > off * near
    return torch.where(over, torch.nextafter(nearest, nearest.new_zeros(())), nearest).double()


def _rounded_sum(large: Tensor, small: Tensor) -> Tensor:
    """Round a sum of FP64 to FP32 once: what the sum in FP64 lost decides where it is a middle."""
    total = large + small
    lost = (large - total) + small  # exact, since ``large`` is the larger
    rounded = total.float()
    apart = total - rounded.double()
    other = torch.nextafter(rounded, rounded + torch.sign(apart).float() * float("inf"))
    middle = (other.double() - total).abs() == apart.abs()
    wrong = middle & (apart != 0) & (torch.sign(lost) == torch.sign(apart))
    return torch.where(wrong, other, rounded)
