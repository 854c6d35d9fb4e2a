"""E5M6 in C++: bytes and numbers are the reference's to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.test_fp8_compiled import DTYPES, SEEDS, SIZES, WIDTHS, spread
from ziphius.kernels import e5m6
from ziphius.kernels.cpu.library import Library


def assert_equal_twelve(library: Library, x: Tensor) -> None:
    found, expected = e5m6.encode_compiled(library, x), e5m6.encode(x)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.packed, expected.packed)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        numbers = e5m6.decode_compiled(library, expected, x.shape[-1], dtype)
        right = e5m6.decode(expected, x.shape[-1], dtype)
        torch.testing.assert_close(numbers, right, rtol=0, atol=0, equal_nan=True)
        none = right.isnan()
        assert torch.equal(numbers.signbit() | none, right.signbit() | none)


@DTYPES
@SIZES
@given(st.sampled_from([1, 5, 40]), WIDTHS, SEEDS)
def test_e5m6(library: Library, dtype: torch.dtype, M: int, C: int, seed: int) -> None:
    assert_equal_twelve(library, spread(M, C, seed=seed, dtype=dtype))


def test_every_number_of_e5m6_and_every_tie(library: Library) -> None:
    """All 4096 codes through decode; all numbers, what is between two and beside that, back."""
    bits = torch.arange(1 << 12, dtype=torch.int32)
    scales = torch.full((1 << 12, 1), 127, dtype=torch.uint8)
    packed = torch.stack([bits & 0xFF, bits >> 8, torch.zeros_like(bits)], 1).to(torch.uint8)
    q = e5m6.E5M6(packed, scales)
    numbers = e5m6.decode_compiled(library, q, 1)
    expected = e5m6.decode(q, 1)
    torch.testing.assert_close(numbers, expected, rtol=0, atol=0, equal_nan=True)
    known = expected[expected.isfinite()].sort().values
    known = known[known.abs() <= e5m6.LARGEST]
    middles = (known[1:] + known[:-1]) / 2
    near = [torch.nextafter(middles, torch.full_like(middles, s * 1e9)) for s in (-1, 1)]
    given = torch.cat([known, middles, *near])
    rows = torch.nn.functional.pad(given, (0, -len(given) % 127)).view(-1, 127)
    # The largest number makes a row's scale 1.
    assert_equal_twelve(library, torch.nn.functional.pad(rows, (1, 0), value=e5m6.LARGEST))


@pytest.mark.parametrize("odd", [float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-45])
def test_odd_numbers_of_e5m6(library: Library, odd: float) -> None:
    x = torch.randn(20, 131)
    x[3, 5] = x[4, 130] = x[5, 0] = odd
    x[7] = -odd
    assert_equal_twelve(library, x)
    assert_equal_twelve(library, x.view(4, 5, 131)[:, 1:3, 1:])
