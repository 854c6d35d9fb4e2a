"""Products with stored codes in Triton: the reference's weights, bit for bit, and their sums."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.triton.conftest import ON_GPU
from ziphius.kernels.stored import Codes
from ziphius.kernels.triton.weight_only import (
    DOTS,
    ONE_ROW,
    Config,
    choose,
    decode_triton,
    weight_only_triton,
)

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FORMS = ("fp8", "int4", "int8")
STORAGE = torch.bfloat16 if ON_GPU else torch.float32
# FP32 sums; a result in BF16 is rounded at 2^-9.
ALLOWED = 3e-3 if ON_GPU else 1e-6


def codes(form: str, O: int, I: int, group: int = 128, scale_rows: int = 1) -> Codes:  # noqa: E741
    generator = torch.Generator().manual_seed(O + I)
    width = I // 2 if form == "int4" else I
    data = torch.randint(0, 256, (O, width), dtype=torch.uint8, generator=generator)
    if form == "fp8":
        data[(data & 127) == 127] = 0  # NaN
    shape = (math.ceil(O / scale_rows), math.ceil(I / group))
    scales = 10 ** (torch.rand(shape, generator=generator) * 4 - 2)
    return Codes(data.to(DEVICE), scales.to(DEVICE), form, group, scale_rows)


def check(N: int, weight: Codes, config: Config | None = None) -> None:
    O, I = weight.shape  # noqa: E741
    x = torch.randn(N, I, generator=torch.Generator().manual_seed(N)).to(DEVICE, STORAGE)
    out = weight_only_triton(x, weight, config=config)
    assert out.shape == (N, O)
    assert out.dtype == STORAGE
    right = x.double() @ weight.decode(torch.float64).T
    assert (out.double() - right).norm() <= ALLOWED * right.norm()


SHAPES = {
    "form": st.sampled_from(FORMS),
    "O": st.integers(1, 150),
    "half": st.integers(1, 150),
    "group": st.sampled_from([32, 96, 128, 320]),
    "scale_rows": st.sampled_from([1, 3, 128]),
}


@settings(max_examples=20, deadline=None)
@given(N=st.sampled_from([1, 2, 16, 17]), **SHAPES)
def test_any_shape(N: int, form: str, O: int, half: int, group: int, scale_rows: int) -> None:  # noqa: E741
    check(N, codes(form, O, 2 * half, group, scale_rows))


@settings(max_examples=20, deadline=None)
@given(**SHAPES)
def test_weights_are_the_references(
    form: str,
    O: int,  # noqa: E741
    half: int,
    group: int,
    scale_rows: int,
) -> None:
    weight = codes(form, O, 2 * half, group, scale_rows)
    decoded = decode_triton(weight, STORAGE)
    assert torch.equal(decoded, weight.decode(STORAGE))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [*DOTS, *ONE_ROW] if ON_GPU else [DOTS[0], ONE_ROW[0]], ids=str)
def test_every_candidate(config: Config, form: str) -> None:
    O, I = (2048, 7168) if ON_GPU else (64, 1024)  # noqa: E741
    check(8 if config.dots else 1, codes(form, O, I), config)


@pytest.mark.parametrize("form", FORMS)
def test_many_rows(form: str) -> None:
    check(300, codes(form, 33, 70))


def test_a_row_depends_on_no_other() -> None:
    weight = codes("int4", 40, 256)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(DEVICE, STORAGE)
    spoilt = x.clone()
    spoilt[1:] = float("nan")
    assert torch.equal(weight_only_triton(spoilt, weight)[0], weight_only_triton(x, weight)[0])


def test_a_scale_that_is_not_finite_shows() -> None:
    weight = codes("int8", 4, 256)
    weight.scales[2, 1] = float("nan")
    out = weight_only_triton(torch.ones(1, 256, device=DEVICE, dtype=STORAGE), weight)
    assert out.isnan().tolist() == [[False, False, True, False]]


def test_nothing_to_do() -> None:
    out = weight_only_triton(
        torch.ones(0, 256, device=DEVICE, dtype=STORAGE), codes("int8", 4, 256)
    )
    assert out.shape == (0, 4)


def test_choice_is_by_shape() -> None:
    assert not choose(1, 7168, 2048, "int8").dots
    assert choose(1, 7168, 2048, "int4").dots
    assert choose(1, 512, 7168, "int8").splits > choose(1, 32768, 7168, "int8").splits
