"""FP8 products of experts against each expert's own sums in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.e4m3 import uneven
from tests.kernels.test_gemm import close, exact
from ziphius.kernels.grouped_gemm import ALONG_K_VERSIONS, MASKED_VERSIONS, VERSIONS
from ziphius.kernels.quantize import Fp8, quantize_blocks, quantize_tiles, turn

COUNTS = st.lists(st.sampled_from([0, 0, 1, 3, 127, 128, 130]), min_size=1, max_size=5)
WIDTHS = st.tuples(st.integers(1, 140), st.integers(1, 300))
SEEDS = st.integers(0, 1000)
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf])


def matrix(q: Fp8, index: int | slice) -> Fp8:
    return Fp8(q.codes[index], q.scales[index], q.rows)


@pytest.mark.parametrize("name", sorted(VERSIONS))
@given(counts=COUNTS, widths=WIDTHS, seed=SEEDS)
def test_contiguous(name: str, counts: list[int], widths: tuple[int, int], seed: int) -> None:
    N, K = widths
    a = quantize_tiles(uneven((sum(counts), K), seed))
    b = quantize_blocks(uneven((len(counts), N, K), seed + 1))
    found = VERSIONS[name](a, b, torch.tensor(counts), torch.float32)
    assert found.shape == (sum(counts), N)
    start = 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        start += count
        assert close(found[rows], *exact(matrix(a, rows), matrix(b, expert)))


@pytest.mark.parametrize("name", sorted(MASKED_VERSIONS))
@given(counts=COUNTS, widths=WIDTHS, seed=SEEDS)
def test_masked(name: str, counts: list[int], widths: tuple[int, int], seed: int) -> None:
    """What lies in rows that do not count, NaN even, reaches no others."""
    N, K = widths
    x = torch.full((len(counts), max(counts) + 2, K), math.nan)
    for expert, count in enumerate(counts):
        x[expert, :count] = uneven((count, K), seed + expert)
    a, b = quantize_tiles(x), quantize_blocks(uneven((len(counts), N, K), seed + 9))
    found = MASKED_VERSIONS[name](a, b, torch.tensor(counts), torch.float32)
    assert found.shape == (len(counts), max(counts) + 2, N)
    for expert, count in enumerate(counts):
        part = matrix(matrix(a, expert), slice(0, count))
        assert close(found[expert, :count], *exact(part, matrix(b, expert)))


@pytest.mark.parametrize("name", sorted(ALONG_K_VERSIONS))
@given(counts=COUNTS, widths=WIDTHS, seed=SEEDS, power_of_two=st.booleans())
def test_along_k(
    name: str, counts: list[int], widths: tuple[int, int], seed: int, power_of_two: bool
) -> None:
    """Every expert's weight gradient; that of an expert without rows is zero."""
    N, K = widths
    dy, x = uneven((sum(counts), N), seed), uneven((sum(counts), K), seed + 1)
    counts_E = torch.tensor(counts)
    a, b = (turn(y, counts_E, power_of_two=power_of_two) for y in (dy, x))
    found = ALONG_K_VERSIONS[name](a, b, counts_E, torch.float32)
    assert found.shape == (len(counts), N, K)
    for expert, (left, right) in enumerate(zip(dy.split(counts), x.split(counts), strict=True)):
        if not len(left):
            assert (found[expert] == 0).all()
            continue
        alone = (turn(part, power_of_two=power_of_two) for part in (left, right))
        assert close(found[expert], *exact(*alone))


Form = Callable[[Fp8, Fp8, Tensor, torch.dtype], Tensor]


@pytest.mark.parametrize("version", [*VERSIONS.values(), *ALONG_K_VERSIONS.values()])
def test_the_total_is_rounded_once(version: Form) -> None:
    counts_E = torch.tensor([3, 0, 5])
    x, y = uneven((8, 40), 0), uneven((8, 50), 1)
    if version in VERSIONS.values():
        a, b = quantize_tiles(x), quantize_blocks(uneven((3, 50, 40), 1))
    else:
        a, b = turn(x, counts_E), turn(y, counts_E)
    wide = version(a, b, counts_E, torch.float32)
    assert torch.equal(version(a, b, counts_E, torch.bfloat16), wide.bfloat16())


@BAD
def test_an_expert_that_is_not_finite_is_seen_in_its_own_rows_alone(bad: float) -> None:
    counts_E = torch.tensor([2, 3])
    x, w = uneven((5, 200), 0), torch.ones(2, 7, 200)
    w[1, 4, 3] = bad
    for version in VERSIONS.values():
        found = version(quantize_tiles(x), quantize_blocks(w), counts_E, torch.float32)
        assert not found[:2].isnan().any()
        # A block is one group: all of the expert's seven rows are in it.
        assert found[2:].isnan().all()


@BAD
def test_a_token_that_is_not_finite_spoils_its_experts_gradient_alone(bad: float) -> None:
    counts_E = torch.tensor([2, 3])
    dy, x = uneven((5, 6), 0), uneven((5, 7), 1)
    dy[3, 2] = bad
    for version in ALONG_K_VERSIONS.values():
        found = version(turn(dy, counts_E), turn(x, counts_E), counts_E, torch.float32)
        assert not found[0].isnan().any()
        assert found[1].isnan().any(1).tolist() == [row == 2 for row in range(6)]
