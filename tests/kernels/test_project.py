"""Products with weights read where they are stored: the reference, and rows by themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.weights import DTYPES, FORMS, assert_near, dense, random_weight
from ziphius.kernels.cpu.library import Library
from ziphius.kernels.project import project_compiled, project_heads_compiled, project_reference
from ziphius.kernels.stored import CODED

SIZES = settings(max_examples=20)
# Around the vectors' 16 and 32 numbers, and far from them.
INNER = st.sampled_from([2, 6, 16, 30, 32, 34, 64, 96, 100, 130, 200])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@SIZES
@given(
    st.integers(1, 13),
    st.integers(1, 70),
    INNER,
    st.sampled_from([32, 64, 128]),
    st.integers(1, 3),
    st.integers(0, 10**6),
)
def test_products(
    library: Library,
    form: str,
    dtype: torch.dtype,
    rows: int,
    outer: int,
    inner: int,
    group: int,
    scale_rows: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight = random_weight(form, outer, inner, group=group, scale_rows=scale_rows, seed=seed)
    x_NI = torch.randn(rows, inner, dtype=torch.float64).to(dtype)
    found_NO = project_compiled(library, x_NI, weight)
    assert_near(found_NO, project_reference(x_NI, weight), dtype)
    # No row depends on how many there are, nor on where it stands.
    for n in range(rows):
        assert torch.equal(project_compiled(library, x_NI[n : n + 1], weight)[0], found_NO[n])


@pytest.mark.parametrize("form", CODED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 40])
def test_codes_are_the_bf16_matrix_that_they_mean(
    library: Library, form: str, dtype: torch.dtype, rows: int
) -> None:
    """Bit for bit, decoded once for many rows or in registers for few."""
    for inner in (64, 130):
        weight = random_weight(form, 37, inner, group=32, scale_rows=2)
        x_NI = torch.randn(rows, inner).to(dtype)
        plain_OI = dense(weight, torch.bfloat16)
        found_NO = project_compiled(library, x_NI, weight)
        assert torch.equal(found_NO, project_compiled(library, x_NI, plain_OI))


def test_master_weights_are_rounded_to_bf16_rows(library: Library) -> None:
    weight_OI, x_NI = torch.randn(33, 70), torch.randn(14, 70).bfloat16()
    found_NO = project_compiled(library, x_NI, weight_OI)
    assert torch.equal(found_NO, project_compiled(library, x_NI, weight_OI.bfloat16()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_a_part_of_wider_ones(library: Library, dtype: torch.dtype) -> None:
    wide_NI, weight = torch.randn(5, 90).to(dtype), random_weight("float32", 7, 40)
    for x_NI in (wide_NI[:, 3:43], wide_NI[:, ::2][:, :40], wide_NI.T[:40, :5].T):
        found_NO = project_compiled(library, x_NI, weight)
        assert torch.equal(found_NO, project_compiled(library, x_NI.contiguous(), weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (7, 3, 10, 12), (13, 16, 64, 64)])
def test_heads(library: Library, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Each with its own weight, out of wider rows and into wider rows."""
    N, H, I, O = shape  # noqa: E741
    x_NHi = torch.randn(N, H, I + 3).to(dtype)
    weight_HOI = (torch.randn(H, O, I) * I**-0.5).to(dtype)
    out_NHo = torch.full((N, H, O + 2), 7.0).to(dtype)
    project_heads_compiled(library, x_NHi, weight_HOI, out_NHo)
    for h in range(H):
        expected_NO = project_reference(x_NHi[:, h, :I], weight_HOI[h])
        assert_near(out_NHo[:, h, :O], expected_NO, dtype)
    assert (out_NHo[..., O:] == 7).all()


def test_gradients_are_refused(library: Library) -> None:
    weight_OI = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no backward"):
        project_compiled(library, torch.randn(2, 4), weight_OI)
    with torch.no_grad():
        assert project_compiled(library, torch.randn(2, 4), weight_OI).shape == (2, 3)
