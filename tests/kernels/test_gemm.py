"""FP8 products against sums in float64 of the same codes and scales."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels import e4m3
from tests.kernels.e4m3 import bits, uneven
from ziphius.kernels.gemm import VERSIONS
from ziphius.kernels.quantize import (
    Fp8,
    quantize_blocks,
    quantize_tiles,
    regroup,
    transpose_blocks,
    turn,
)

SIZES = st.tuples(st.integers(1, 140), st.integers(1, 140), st.integers(1, 300))
SEEDS = st.integers(0, 1000)
NAMES = st.sampled_from(sorted(VERSIONS))


def exact(a: Fp8, b: Fp8) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of magnitudes that bounds its rounding."""
    left, right = (
        torch.tensor(e4m3.dequantize(bits(q.codes), q.scales.numpy(), q.rows)) for q in (a, b)
    )
    return left @ right.T, left.abs() @ right.T.abs()


def close(found: Tensor, wanted: Tensor, size: Tensor) -> bool:
    """FP32 sums: 128 terms of a group, three roundings of scales, and the groups' total."""
    assert found.dtype == torch.float32
    return bool(((found.double() - wanted).abs() <= 160 * 2.0**-24 * size).all())


@given(SIZES, SEEDS, st.booleans(), NAMES)
def test_activations_by_weights(
    sizes: tuple[int, int, int], seed: int, power_of_two: bool, name: str
) -> None:
    M, N, K = sizes
    a = quantize_tiles(uneven((M, K), seed), power_of_two=power_of_two)
    b = quantize_blocks(uneven((N, K), seed + 1), power_of_two=power_of_two)
    found = VERSIONS[name](a, b, torch.float32)
    assert found.shape == (M, N)
    assert close(found, *exact(a, b))


@given(SIZES, SEEDS, NAMES)
def test_gradients_by_transposed_weights(sizes: tuple[int, int, int], seed: int, name: str) -> None:
    """``dy W``: the blocks of W are transposed with their scales."""
    M, N, K = sizes
    w = quantize_blocks(uneven((N, K), seed))
    dy = quantize_tiles(uneven((M, N), seed + 1))
    found = VERSIONS[name](dy, transpose_blocks(w), torch.float32)
    left = e4m3.dequantize(bits(dy.codes), dy.scales.numpy(), 1)
    right = e4m3.dequantize(bits(w.codes), w.scales.numpy(), 128)
    size = torch.tensor(np.abs(left) @ np.abs(right))
    assert close(found, torch.tensor(left @ right), size)


@given(SIZES, SEEDS, NAMES)
def test_gradient_of_a_weight(sizes: tuple[int, int, int], seed: int, name: str) -> None:
    """``dy^T x`` sums over tokens, of which 128 share a scale a channel in both operands."""
    N, K, M = sizes
    dy, x = uneven((M, N), seed), quantize_tiles(uneven((M, K), seed + 1), power_of_two=True)
    a, b = turn(dy), regroup(x, power_of_two=True)
    found = VERSIONS[name](a, b, torch.float32)
    assert found.shape == (N, K)
    assert close(found, *exact(a, b))
    rough = dy.double().T @ uneven((M, K), seed + 1).double()
    size = dy.double().abs().T @ uneven((M, K), seed + 1).double().abs()
    # Two roundings to three bits of fraction, and subnormals of whatever group.
    assert ((found.double() - rough).abs() <= 0.15 * size + 0.02 * size.max()).all()


@given(SEEDS, NAMES)
def test_small_integers_are_exact(seed: int, name: str) -> None:
    """No rounding anywhere where scales are powers of two and sums below 2^24."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-8, 9, (9, 400), generator=generator).float() for _ in range(2))
    product = VERSIONS[name](
        quantize_tiles(a, power_of_two=True), quantize_blocks(b, power_of_two=True), torch.float32
    )
    assert torch.equal(product, a @ b.T)


@pytest.mark.parametrize("name", sorted(VERSIONS))
def test_the_total_is_rounded_once(name: str) -> None:
    a, b = quantize_tiles(uneven((20, 300), 0)), quantize_blocks(uneven((30, 300), 1))
    wide = VERSIONS[name](a, b, torch.float32)
    assert torch.equal(VERSIONS[name](a, b, torch.bfloat16), wide.bfloat16())


@pytest.mark.parametrize("name", sorted(VERSIONS))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_seen(name: str, bad: float) -> None:
    x = torch.ones(3, 300)
    x[1, 130] = bad
    found = VERSIONS[name](quantize_tiles(x), quantize_blocks(torch.ones(5, 300)), torch.float32)
    assert torch.equal(found.isnan(), torch.tensor([[False], [True], [False]]).expand(3, 5))


@pytest.mark.parametrize("name", sorted(VERSIONS))
def test_zeros(name: str) -> None:
    a, b = quantize_tiles(torch.zeros(3, 200)), quantize_blocks(uneven((5, 200), 0))
    assert (VERSIONS[name](a, b, torch.float32) == 0).all()


@pytest.mark.parametrize("name", sorted(VERSIONS))
def test_no_rows(name: str) -> None:
    a = quantize_tiles(torch.empty(0, 200))
    found = VERSIONS[name](a, quantize_blocks(uneven((5, 200), 0)), torch.bfloat16)
    assert found.shape == (0, 5)
