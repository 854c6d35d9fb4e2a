"""Weights as a checkpoint stores them: what the codes mean, and what kernels are told of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.weights import FORMS, random_weight
from ziphius.kernels.cpu.library import Library
from ziphius.kernels.project import project_compiled
from ziphius.kernels.stored import CODED, WORDS, Codes, describe


def e4m3(code: int) -> float:
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


@pytest.mark.parametrize("form", CODED)
@pytest.mark.parametrize(("group", "scale_rows"), [(32, 1), (64, 2), (128, 128)])
def test_decoding_by_hand(form: str, group: int, scale_rows: int) -> None:
    """Code times the scale of its rows and columns, rounded to BF16."""
    codes = random_weight(form, 5, 70, group=group, scale_rows=scale_rows)
    assert isinstance(codes, Codes)
    assert codes.shape == (5, 70)
    decoded = codes.decode(torch.float32)
    for row in range(5):
        for column in range(70):
            if form == "int4":
                value = float((int(codes.data[row, column // 2]) >> column % 2 * 4 & 15) - 8)
            else:
                byte = int(codes.data[row, column])
                value = e4m3(byte) if form == "fp8" else float(byte - 128)
            scale = codes.scales[row // scale_rows, column // group]
            expected = (torch.tensor(value) * scale).bfloat16().float()
            assert decoded[row, column] == expected


def test_sizes() -> None:
    codes = random_weight("int4", 6, 64, group=32)
    assert isinstance(codes, Codes)
    assert codes.nbytes == 6 * 32 + 6 * 2 * 4
    assert codes.decode(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 3), st.integers(0, 10**6))
def test_kernels_read_the_numbers_that_are_meant(
    library: Library,
    form: str,
    dtype: torch.dtype,
    outer: int,
    half: int,
    scale_rows: int,
    seed: int,
) -> None:
    """Rows of the identity have sums of one term: the products are the weight itself, exactly."""
    inner = 2 * half
    weight = random_weight(form, outer, inner, group=32, scale_rows=scale_rows, seed=seed)
    found = project_compiled(library, torch.eye(inner, dtype=dtype), weight)
    plain = weight.decode(dtype) if isinstance(weight, Codes) else weight.to(dtype)
    assert torch.equal(found, plain.T)


def test_a_description_has_its_words() -> None:
    for form in FORMS:
        assert len(describe(random_weight(form, 4, 64))) == WORDS


def test_numbers_must_lie_side_by_side() -> None:
    with pytest.raises(ValueError, match="side by side"):
        describe(torch.randn(4, 6).T)
    codes = random_weight("int8", 6, 64)
    assert isinstance(codes, Codes)
    with pytest.raises(ValueError, match="side by side"):
        describe(Codes(codes.data[:, :32], codes.scales, "int8", 32))
    with pytest.raises(ValueError, match="multiples of 32"):
        describe(Codes(codes.data, codes.scales, "int8", 48))
