"""Tiles and blocks in E4M3: equal to a search in float64, to the bit; laws of turning."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels import e4m3
from tests.kernels.e4m3 import bits, uneven
from ziphius.kernels.quantize import (
    E4M3,
    Fp8,
    dequantize,
    quantize_blocks,
    quantize_tiles,
    regroup,
    scales_of,
    segment_starts,
    tile_count,
    transpose_blocks,
    turn,
    turned_width,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = st.tuples(st.integers(1, 140), st.integers(1, 300))
SEEDS = st.integers(0, 1000)
COUNTS = st.lists(st.sampled_from([0, 0, 1, 5, 127, 128, 129, 300]), min_size=1, max_size=5)


def same(q: Fp8, codes: np.ndarray, scales: np.ndarray) -> None:
    assert q.codes.dtype == E4M3
    assert q.scales.dtype == torch.float32
    assert np.array_equal(q.scales.numpy(), scales)
    assert np.array_equal(bits(q.codes), codes)


@given(SHAPES, SEEDS, st.booleans(), st.sampled_from(DTYPES))
def test_tiles_equal_the_search_in_float64(
    shape: tuple[int, int], seed: int, power_of_two: bool, dtype: torch.dtype
) -> None:
    x = uneven((shape[0] % 5 + 1, shape[1]), seed).to(dtype)
    same(quantize_tiles(x, power_of_two=power_of_two), *e4m3.quantize(x, 1, power_of_two))


@given(SHAPES, SEEDS, st.booleans(), st.sampled_from(DTYPES))
def test_blocks_equal_the_search_in_float64(
    shape: tuple[int, int], seed: int, power_of_two: bool, dtype: torch.dtype
) -> None:
    x = uneven(shape, seed).to(dtype)
    q = quantize_blocks(x, power_of_two=power_of_two)
    same(q, *e4m3.quantize(x, 128, power_of_two))
    assert q.rows == 128


@given(SHAPES, SEEDS, st.booleans(), st.booleans())
def test_dequantize_equals_float64(
    shape: tuple[int, int], seed: int, power_of_two: bool, blocks: bool
) -> None:
    """The product has 28 bits: exact in float64, rounded once in FP32, and once more nowhere."""
    x = uneven(shape, seed)
    q = (quantize_blocks if blocks else quantize_tiles)(x, power_of_two=power_of_two)
    exact = e4m3.dequantize(bits(q.codes), q.scales.numpy(), q.rows)
    assert np.array_equal(dequantize(q, torch.float64).numpy(), exact)
    assert np.array_equal(dequantize(q).numpy(), exact.astype(np.float32))
    assert torch.equal(dequantize(q, torch.bfloat16), dequantize(q).bfloat16())


def test_every_code_and_every_middle_between_two() -> None:
    """With 448 in its tile a number keeps its size; middles go to the even code."""
    middles = (e4m3.SIZES[1:] + e4m3.SIZES[:-1]) / 2
    around = [np.nextafter(middles.astype(np.float32), np.float32(to)) for to in (0, np.inf)]
    column = torch.tensor(np.concatenate((e4m3.SIZES, middles, *around)), dtype=torch.float32)
    x = torch.stack((column, -column, torch.full_like(column, 448)), 1)
    q = quantize_tiles(x)
    assert (q.scales == 1).all()
    assert np.array_equal(bits(q.codes), e4m3.codes(x.double().numpy()))
    assert set(bits(q.codes)[:, 0]) == set(range(127))
    assert torch.equal(dequantize(q)[:127], x[:127])


def test_appendix_a() -> None:
    x = torch.linspace(-3, 5, 128)[None]
    q = quantize_tiles(x)
    assert float(q.scales) == pytest.approx(0.011160715, rel=1e-7)
    assert float((dequantize(q) - x).abs().max()) == pytest.approx(0.16873, abs=5e-6)
    assert quantize_tiles(x, power_of_two=True).scales.tolist() == [[2.0**-6]]
    zeros = quantize_tiles(torch.zeros(1, 128))
    assert float(zeros.scales) == pytest.approx(2.232e-7, rel=1e-4)
    assert (dequantize(zeros) == 0).all()


@given(st.floats(2.0**-100, 2.0**127, width=32), st.integers(-3, 3))
def test_ue8m0_is_the_next_power_of_two(amax: float, steps: int) -> None:
    """Never below the plain scale, never twice it; a power of two stays."""
    plain = float(scales_of(torch.tensor(amax), power_of_two=False))
    power = float(scales_of(torch.tensor(amax), power_of_two=True))
    assert math.frexp(power)[0] == 0.5
    assert plain <= power < 2 * plain
    exact = torch.tensor(448.0) * 2.0**steps
    assert float(scales_of(exact, power_of_two=True)) == 2.0**steps
    above = exact.nextafter(torch.tensor(torch.inf))
    assert float(scales_of(above, power_of_two=True)) == 2.0 ** (steps + 1)


@given(SHAPES, SEEDS, st.booleans())
def test_round_trip_is_off_by_a_sixteenth_at_most(
    shape: tuple[int, int], seed: int, power_of_two: bool
) -> None:
    """Or half of E4M3's smallest number times the scale."""
    x = uneven((3, shape[1]), seed, spread=4.0)
    q = quantize_tiles(x, power_of_two=power_of_two)
    off = (dequantize(q, torch.float64) - x.double()).abs()
    step = q.scales.double().repeat_interleave(128, -1)[:, : shape[1]] * 2.0**-10
    assert (off <= torch.maximum(x.double().abs() / 16, step) * (1 + 1e-6)).all()


@given(SHAPES, SEEDS, st.integers(-8, 90), st.booleans())
def test_a_power_of_two_moves_the_scales_alone(
    shape: tuple[int, int], seed: int, power: int, power_of_two: bool
) -> None:
    x = uneven((3, shape[1]), seed)
    x[:, ::128] += torch.copysign(torch.tensor(1.0), x[:, ::128])
    plain = quantize_tiles(x, power_of_two=power_of_two)
    scaled = quantize_tiles(x * 2.0**power, power_of_two=power_of_two)
    assert np.array_equal(bits(plain.codes), bits(scaled.codes))
    assert torch.equal(plain.scales * 2.0**power, scaled.scales)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_group_that_is_not_finite_becomes_nan_as_a_whole(
    bad: float, power_of_two: bool, blocks: bool
) -> None:
    x = torch.ones(140, 300)
    x[:, 7] = 0
    x[130, 200] = bad
    q = (quantize_blocks if blocks else quantize_tiles)(x, power_of_two=power_of_two)
    hit = torch.zeros(140, 300, dtype=torch.bool)
    hit[128 if blocks else 130 : 140 if blocks else 131, 128:256] = True
    back = dequantize(q)
    assert torch.equal(back.isnan(), hit)
    assert not back.isinf().any()
    turned = dequantize(regroup(quantize_tiles(x, power_of_two=power_of_two)))
    assert turned.isnan().any(1).nonzero().flatten().tolist() == list(range(128, 256))


def test_very_large_and_very_small_numbers_stay_finite() -> None:
    x = torch.tensor([[1.9 * 2.0**126, -1.0], [1e-38, 1e-45]])
    for power_of_two in (False, True):
        back = dequantize(quantize_tiles(x, power_of_two=power_of_two))
        assert back.isfinite().all()
        assert float(back[0, 0]) == pytest.approx(float(x[0, 0]), rel=1 / 16)


def test_what_fp32_cannot_hold_is_seen() -> None:
    x = torch.tensor([[1e300, 1.0]], dtype=torch.float64)
    assert dequantize(quantize_tiles(x)).isnan().all()


def test_a_stack_is_its_matrices() -> None:
    x = uneven((2, 3, 140, 200), 0)
    for quantize in (quantize_tiles, quantize_blocks):
        whole = quantize(x)
        back = dequantize(whole)
        for index in np.ndindex(2, 3):
            one = quantize(x[index])
            assert torch.equal(one.scales, whole.scales[index])
            assert torch.equal(dequantize(one), back[index])


def test_bytes() -> None:
    x = torch.zeros(256, 384, dtype=torch.bfloat16)
    assert quantize_tiles(x).nbytes == 256 * 384 + 4 * 256 * 3
    assert quantize_blocks(x).nbytes == 256 * 384 + 4 * 2 * 3


@given(SHAPES, SEEDS)
def test_transposed_blocks_are_the_same_numbers(shape: tuple[int, int], seed: int) -> None:
    q = quantize_blocks(uneven(shape, seed))
    turned = transpose_blocks(q)
    assert torch.equal(dequantize(turned), dequantize(q).T)
    assert turned.codes.is_contiguous()
    again = quantize_blocks(uneven(shape, seed).T)
    assert torch.equal(again.scales, turned.scales)
    assert np.array_equal(bits(again.codes), bits(turned.codes))


@given(SHAPES, SEEDS, st.booleans())
def test_turned_is_the_transposed_matrix_in_tiles(
    shape: tuple[int, int], seed: int, power_of_two: bool
) -> None:
    x = uneven(shape, seed)
    q = turn(x, power_of_two=power_of_two)
    assert q.codes.shape == (shape[1], tile_count(shape[0]) * 128)
    codes, scales = e4m3.quantize(x.T, 1, power_of_two)
    assert np.array_equal(bits(q.codes)[:, : shape[0]], codes)
    assert not bits(q.codes)[:, shape[0] :].any()
    assert np.array_equal(q.scales.numpy(), scales)


@given(COUNTS, SEEDS, st.booleans())
def test_segments_are_turned_one_by_one(counts: list[int], seed: int, power_of_two: bool) -> None:
    """Each in groups of its own, and zeros between; empty ones take no room."""
    x, counts_E = uneven((sum(counts), 3), seed), torch.tensor(counts)
    q = turn(x, counts_E, power_of_two=power_of_two)
    width = turned_width(sum(counts), len(counts))
    assert q.codes.shape == (3, width)
    assert q.scales.shape == (3, width // 128)
    free = np.ones(width, dtype=bool)
    starts = segment_starts(counts_E).tolist()
    for start, part in zip(starts, x.split(counts), strict=True):
        if not len(part):
            continue
        assert start % 128 == 0
        alone = turn(part, power_of_two=power_of_two)
        end = start + alone.codes.shape[1]
        assert end <= width
        assert free[start:end].all()
        free[start:end] = False
        assert np.array_equal(bits(q.codes)[:, start:end], bits(alone.codes))
        assert torch.equal(q.scales[:, start // 128 : end // 128], alone.scales)
    assert not bits(q.codes)[:, free].any()


def scale_of_each(q: Fp8) -> Tensor:
    return q.scales.repeat_interleave(128, -1)[:, : q.codes.shape[1]]


@given(SHAPES, SEEDS, st.booleans())
def test_regrouping_changes_a_number_only_under_a_larger_scale(
    shape: tuple[int, int], seed: int, segmented: bool
) -> None:
    """The law of scales that are powers of two: facts 4.2."""
    first, M = quantize_tiles(uneven(shape, seed), power_of_two=True), shape[0]
    counts = torch.tensor([M // 3, 0, M - M // 3]) if segmented else None
    second = regroup(first, counts, power_of_two=True)
    places = torch.arange(M)
    if counts is not None:
        places[M // 3 :] += int(segment_starts(counts)[2]) - M // 3
    before, after = dequantize(first), dequantize(second)[:, places].T
    scale = scale_of_each(second)[:, places].T
    larger = scale > scale_of_each(first)
    assert torch.equal(after[~larger], before[~larger])
    # Under a larger scale only what becomes subnormal there has fewer bits.
    assert ((after - before).abs() <= scale * 2.0**-10).all()


def test_regrouping_with_other_scales_rounds_again() -> None:
    """What the power-of-two rule is for: with FP32 scales almost every number moves."""
    x = uneven((256, 256), 0, spread=0.5)
    moved = {}
    for power_of_two in (False, True):
        first = quantize_tiles(x, power_of_two=power_of_two)
        after = dequantize(regroup(first, power_of_two=power_of_two)).T
        moved[power_of_two] = float((after != dequantize(first)).float().mean())
    assert moved[False] > 0.8
    assert moved[True] < 0.05


def test_rows_that_do_not_lie_together() -> None:
    x = uneven((200, 130), 3)
    assert np.array_equal(bits(quantize_tiles(x.T).codes), e4m3.quantize(x.T, 1, False)[0])


def test_no_rows() -> None:
    assert quantize_tiles(torch.empty(0, 130)).scales.shape == (0, 2)
    q = turn(torch.empty(0, 3), torch.tensor([0, 0]))
    assert q.codes.shape == (3, 256)
