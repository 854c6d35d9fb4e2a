"""The emulated tensor core against exact fractions, the report's error figures, and its 34 bits."""

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.kernels.accumulate import accumulate, add_aligned, gemm_hopper
from ziphius.kernels.gemm import gemm_reference
from ziphius.kernels.quantize import quantize_blocks, quantize_tiles

E4M3 = torch.float8_e4m3fn
# All magnitudes of E4M3, from the definition.
SIZES = sorted(
    (fraction / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7)
    for exponent, fraction in product(range(16), range(8))
    if (exponent, fraction) != (15, 7)
)
# All magnitudes of products, in units of 2^-18: integers.
PRODUCTS = sorted({int(a * b * 2**18) for a in SIZES for b in SIZES})
FP32_FRACTION = 23


def exponent(x: Fraction) -> int:
    """floor(log2 |x|)."""
    top, bottom = abs(x).numerator, abs(x).denominator
    guess = top.bit_length() - bottom.bit_length()
    return guess if abs(x) >= Fraction(2) ** guess else guess - 1


def cut(x: Fraction, bits: int, at: int) -> Fraction:
    """``x`` without what lies below the last of ``bits`` places from exponent ``at`` on."""
    place = Fraction(2) ** (at - bits + 1)
    return int(x / place) * place


def one_instruction(terms: list[Fraction], kept: int) -> Fraction:
    largest = max(terms, key=abs)
    if not largest:
        return Fraction(0)
    return sum((cut(term, kept, exponent(largest)) for term in terms), Fraction(0))


def one_output(
    a: list[float], b: list[float], interval: int | None, kept: int, register: int
) -> float:
    """What one output of the tensor core should be."""
    total, partial = np.float32(0), Fraction(0)
    for start in range(0, len(a), 32):
        if interval and start and start % interval == 0:
            total, partial = np.float32(float(total) + float(partial)), Fraction(0)
        pairs = zip(a[start : start + 32], b[start : start + 32], strict=True)
        summed = one_instruction([*(Fraction(x) * Fraction(y) for x, y in pairs), partial], kept)
        partial = cut(summed, register, exponent(summed)) if summed else summed
    return float(np.float32(float(total) + float(partial)))


def numbers(rows: int, K: int, seed: int, spread: float = 1.0) -> Tensor:
    """E4M3 numbers of uneven sizes, some zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(rows, K, generator=generator))
    x = 16 * torch.randn(rows, K, generator=generator) * sizes
    x = torch.where(torch.rand(rows, K, generator=generator) < 0.1, 0.0, x)
    return x.clamp(-448, 448).to(E4M3).float()


@given(
    st.integers(1, 300),
    st.integers(0, 1000),
    st.sampled_from([None, 32, 64, 128]),
    st.sampled_from([(14, 14), (10, 14), (18, 24), (29, 24), (28, 20)]),
    st.sampled_from([0.0, 4.0]),
)
def test_equals_exact_fractions(
    K: int, seed: int, interval: int | None, bits: tuple[int, int], spread: float
) -> None:
    a, b = numbers(2, K, seed, spread), numbers(3, K, seed + 1, spread)
    kept, register = bits
    found = accumulate(a, b, interval, kept=kept, register=register)
    wanted = [[one_output(x, y, interval, kept, register) for y in b.tolist()] for x in a.tolist()]
    assert found.tolist() == wanted


def test_small_terms_vanish_beside_a_large_one() -> None:
    """With 14 bits 2^13 keeps ones, and halves are gone, of either sign."""
    a = torch.tensor([[128.0, 1.5, 1.5, -1.5, 0.5]])
    b = torch.tensor([[64.0, 1.0, 1.0, 1.0, 1.0]])
    assert accumulate(a, b).tolist() == [[8192 + 1 + 1 - 1]]
    assert accumulate(a, b, kept=15, register=15).tolist() == [[8192 + 2]]
    assert accumulate(a, b, kept=15, register=12).tolist() == [[8192]]


def test_promotion_starts_from_zero() -> None:
    """Ones no longer reach an accumulator at 2^14; promoted, they are counted apart."""
    a = torch.ones(1, 256)
    a[0, 0] = 64
    b = torch.ones(1, 256)
    b[0, 0] = 256
    assert accumulate(a, b).tolist() == [[16384]]
    assert accumulate(a, b, 128).tolist() == [[16384 + 128]]
    assert accumulate(a, b, 32).tolist() == [[16384 + 224]]


def test_float8_goes_in_as_it_is() -> None:
    a, b = numbers(3, 70, 0), numbers(2, 70, 1)
    assert torch.equal(accumulate(a.to(E4M3), b.to(E4M3)), accumulate(a, b))


@pytest.mark.parametrize("interval", [0, 16, 100, -32])
def test_an_interval_between_instructions_is_refused(interval: int) -> None:
    with pytest.raises(BadInput, match="multiple of 32"):
        accumulate(torch.ones(1, 64), torch.ones(1, 64), interval)


def test_not_a_number_is_seen() -> None:
    a = torch.ones(2, 64)
    a[1, 3] = math.nan
    found = accumulate(a, torch.ones(1, 64), 32)
    assert found[0, 0] == 64
    assert found[1, 0].isnan()


def test_promoted_products_apply_the_scales_of_groups() -> None:
    """Each group of 128 is cut by itself, whatever the others' sizes."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-3, 4, (9, 300), generator=generator).float() for _ in range(2))
    # Groups of very different sizes.
    x, w = x * torch.tensor([1.0, 2.0**9, 2.0**-5]).repeat_interleave(100), w * 0.25
    a, b = quantize_tiles(x, power_of_two=True), quantize_blocks(w, power_of_two=True)
    parts = [
        accumulate(a.codes[:, part], b.codes[:, part]) * a.scales[:, [i]] * b.scales[0, i]
        for i, part in enumerate((slice(0, 128), slice(128, 256), slice(256, 300)))
    ]
    found = gemm_hopper(a, b, torch.float32)
    assert torch.equal(found, parts[0] + parts[1] + parts[2])
    size = x.abs() @ w.abs().T
    assert ((found - gemm_reference(a, b, torch.float32)).abs() <= 2.0**-10 * size).all()
    assert torch.equal(gemm_hopper(a, b, torch.bfloat16), found.bfloat16())


def matrices(kind: str, K: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn if kind == "normal" else torch.rand
    a, b = (draw(64, K, generator=generator) for _ in range(2))
    return (a * 448 / a.abs().max()).to(E4M3), (b * 448 / b.abs().max()).to(E4M3)


def worst(found: Tensor, a: Tensor, b: Tensor) -> float:
    """The largest error, as a share of the outputs' root mean square."""
    exact = a.double() @ b.double().T
    return float((found.double() - exact).abs().max() / exact.square().mean().sqrt())


def test_the_report_has_about_two_percent_at_4096() -> None:
    """About one of normal numbers, eight of positive ones, whose sums grow with K, not its root."""
    a, b = matrices("normal", 4096)
    assert 0.008 < worst(accumulate(a, b), a, b) < 0.02
    assert worst(accumulate(a, b, 128), a, b) < 0.001
    a, b = matrices("uniform", 4096)
    assert 0.06 < worst(accumulate(a, b), a, b) < 0.1
    assert worst(accumulate(a, b, 128), a, b) < 0.001


def test_error_grows_with_k_and_with_the_interval() -> None:
    errors = [
        worst(accumulate(*matrices("normal", K)), *matrices("normal", K)) for K in (256, 4096)
    ]
    assert errors[1] > 2 * errors[0]
    a, b = matrices("normal", 4096)
    promoted = [worst(accumulate(a, b, interval), a, b) for interval in (128, 512, 2048)]
    assert promoted[0] < promoted[1] < promoted[2] < errors[1]


def units_lost(bits: int) -> list[float]:
    """The most that 32 products lose, for each exponent of the largest, in units of FP32 there.

    The largest one has eight bits and loses none, so 31 do.
    """
    losses = []
    for at in range(PRODUCTS[-1].bit_length()):
        place = Fraction(2) ** (at - (bits - 5) + 1)
        smaller = (p for p in PRODUCTS if p.bit_length() <= at + 1)
        lost = max(Fraction(p) - cut(Fraction(p), bits - 5, at) for p in smaller)
        assert lost < place
        losses.append(float(31 * lost / Fraction(2) ** (at - FP32_FRACTION)))
    return losses


def test_34_bits_are_enough_for_every_32_products_and_33_are_not() -> None:
    """Over all products of two E4M3 numbers that there are."""
    assert max(units_lost(34)) < 1
    assert max(units_lost(33)) > 1.7


def test_32_products_that_33_bits_get_wrong() -> None:
    largest, small = 448.0**2, (15 * 2.0**-9) ** 2
    terms = torch.tensor([largest] + [small] * 31)
    exact, unit = largest + 31 * small, 2.0 ** (17 - FP32_FRACTION)
    off = {bits: exact - float(add_aligned(terms, bits - 5, torch.float64)) for bits in (33, 34)}
    assert off[33] > 1.7 * unit
    assert off[34] < unit


@given(st.lists(st.sampled_from(PRODUCTS), min_size=32, max_size=32), st.integers(0, 2**32 - 1))
def test_34_bits_keep_sums_of_any_signs_within_a_unit(sizes: list[int], signs: int) -> None:
    signed = [-size if signs >> i & 1 else size for i, size in enumerate(sizes)]
    terms = torch.tensor(signed, dtype=torch.float64).float() * 2.0**-18
    found = Fraction(float(add_aligned(terms, 34 - 5, torch.float64))) * 2**18
    unit = Fraction(2) ** (max(sizes).bit_length() - 1 - FP32_FRACTION)
    assert abs(found - sum(signed)) < unit


def test_an_exact_sum_takes_41_bits() -> None:
    assert PRODUCTS[1] == 1
    assert (32 * PRODUCTS[-1]).bit_length() == 41
