"""Every quantiser gives the reference's codes and scales, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.triton.support import DEVICE, ON_GPU, STORAGE, assert_same, on_cpu
from ziphius.kernels.quantize import Fp8, TorchQuantize, turned_width
from ziphius.kernels.triton.quantize import CANDIDATES, Launch, TritonQuantize

reference = TorchQuantize()
ours = TritonQuantize()
few = settings(max_examples=40 if ON_GPU else 12)
seeds = st.integers(0, 10**6)
rows = st.integers(1, 300)
columns = st.integers(1, 300)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = STORAGE) -> Tensor:
    """Draw numbers of many magnitudes; some rows are zeros, as a dead channel's."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * 10 ** (torch.rand(shape[:-1], generator=generator) * 12 - 6).unsqueeze(-1)
    x[torch.rand(shape[:-1], generator=generator) < 0.1] = 0
    return x.to(dtype).to(DEVICE)


def segments(M: int, E: int, seed: int) -> Tensor:
    """Draw how many of ``M`` rows each of ``E`` experts has; some have none."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(E, generator=generator) * (torch.rand(E, generator=generator) < 0.7)
    weights[seed % E] += 0.1
    drawn = torch.multinomial(weights, M, replacement=True, generator=generator)
    return drawn.bincount(minlength=E).to(DEVICE)


@few
@given(rows, columns, st.booleans(), seeds)
def test_tiles(M: int, C: int, power_of_two: bool, seed: int) -> None:
    x = numbers(M, C, seed=seed)
    expected = reference.tiles(on_cpu(x), power_of_two=power_of_two)
    assert_same(ours.tiles(x, power_of_two=power_of_two), expected)


@few
@given(rows, columns, st.integers(0, 9), st.booleans(), seeds)
def test_turned_by_segments_and_without(
    M: int, C: int, E: int, power_of_two: bool, seed: int
) -> None:
    x = numbers(M, C, seed=seed)
    counts_E = segments(M, E, seed) if E else None
    arguments = on_cpu(x), on_cpu(counts_E)
    expected = reference.turn(*arguments, power_of_two=power_of_two)
    assert_same(ours.turn(x, counts_E, power_of_two=power_of_two), expected)


@few
@given(rows, columns, st.integers(0, 9), st.booleans(), seeds)
def test_both_at_once(M: int, C: int, E: int, power_of_two: bool, seed: int) -> None:
    x = numbers(M, C, seed=seed)
    counts_E = segments(M, E, seed) if E else None
    expected = reference.both(on_cpu(x), on_cpu(counts_E), power_of_two=power_of_two)
    for result, wanted in zip(
        ours.both(x, counts_E, power_of_two=power_of_two), expected, strict=True
    ):
        assert_same(result, wanted)


@few
@given(rows, columns, st.integers(0, 9), st.booleans(), seeds)
def test_regrouped(M: int, C: int, E: int, power_of_two: bool, seed: int) -> None:
    q = reference.tiles(on_cpu(numbers(M, C, seed=seed)), power_of_two=power_of_two)
    counts_E = segments(M, E, seed) if E else None
    expected = reference.regroup(q, on_cpu(counts_E), power_of_two=power_of_two)
    moved = Fp8(q.codes.to(DEVICE), q.scales.to(DEVICE))
    assert_same(ours.regroup(moved, counts_E, power_of_two=power_of_two), expected)


@few
@given(
    st.sampled_from([(), (1,), (3,)]),
    st.integers(1, 200),
    st.integers(1, 200),
    st.booleans(),
    st.sampled_from([torch.float32, STORAGE]),
    seeds,
)
def test_blocks_and_their_transpose(
    stack: tuple[int, ...],
    high: int,
    wide: int,
    power_of_two: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    weight = numbers(*stack, high, wide, seed=seed, dtype=dtype)
    expected = reference.blocks(on_cpu(weight), power_of_two=power_of_two)
    for result, wanted in zip(
        ours.blocks(weight, power_of_two=power_of_two), expected, strict=True
    ):
        assert_same(result, wanted)


@few
@given(st.integers(1, 70), st.integers(1, 150), st.floats(30, 38.4), st.booleans(), seeds)
def test_the_largest_there_are(M: int, C: int, power: float, power_of_two: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(M, C, generator=generator) * 2 - 1) * 10**power
    x = x.to(STORAGE).to(DEVICE)
    for name in ("both", "blocks"):
        results = getattr(ours, name)(x, power_of_two=power_of_two)
        expected = getattr(reference, name)(on_cpu(x), power_of_two=power_of_two)
        for result, wanted in zip(results, expected, strict=True):
            assert_same(result, wanted)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_not_finite_spoils_its_group_alone(bad: float, power_of_two: bool) -> None:
    """In the codes too: the rest of an infinity's group stays zero, as in the reference."""
    x = numbers(5, 300, seed=3)
    x[2, 130], x[4, 299] = bad, bad
    for name in ("tiles", "turn", "both", "blocks"):
        results = getattr(ours, name)(x, power_of_two=power_of_two)
        expected = getattr(reference, name)(on_cpu(x), power_of_two=power_of_two)
        if isinstance(results, Fp8):
            results, expected = (results,), (expected,)
        for result, wanted in zip(results, expected, strict=True):
            assert not wanted.scales.isfinite().all()
            assert_same(result, wanted)


def test_rows_that_lie_apart() -> None:
    whole = numbers(130, 512, seed=4)
    view = whole[:, 100:400]
    assert not view.is_contiguous()
    assert_same(ours.tiles(view), reference.tiles(on_cpu(view)))
    assert_same(ours.turn(view), reference.turn(on_cpu(view)))
    assert_same(ours.both(view)[1], reference.turn(on_cpu(view)))


def test_columns_that_lie_apart_are_copied() -> None:
    x = numbers(70, 90, seed=5).T
    assert_same(ours.tiles(x), reference.tiles(on_cpu(x)))


def test_more_dimensions_stay() -> None:
    x = numbers(2, 3, 200, seed=6)
    result = ours.tiles(x)
    assert result.scales.shape == (2, 3, 2)
    assert_same(result, reference.tiles(on_cpu(x)))


@pytest.mark.parametrize("counts", [None, [0, 0, 0]])
def test_no_rows(counts: list[int] | None) -> None:
    """An expert-parallel rank may get no token; room for the segments is there all the same."""
    counts_E = None if counts is None else torch.tensor(counts, device=DEVICE)
    x = numbers(0, 200)
    assert_same(ours.tiles(x), reference.tiles(on_cpu(x)))
    assert_same(ours.turn(x, counts_E), reference.turn(on_cpu(x), on_cpu(counts_E)))
    tiles, turned = ours.both(x, counts_E)
    assert tiles.codes.shape == (0, 200)
    assert turned.codes.shape == (200, turned_width(0, 1 if counts is None else 3))


@pytest.mark.parametrize("launch", CANDIDATES)
def test_every_candidate_of_a_launch(launch: Launch) -> None:
    x, candidate = numbers(150, 140, seed=7), TritonQuantize(launch)
    assert_same(candidate.tiles(x), reference.tiles(on_cpu(x)))
    for result, wanted in zip(candidate.blocks(x), reference.blocks(on_cpu(x)), strict=True):
        assert_same(result, wanted)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter is too slow for layers of real sizes")
@pytest.mark.parametrize("power_of_two", [False, True])
def test_sizes_of_the_report(power_of_two: bool) -> None:
    x, counts_E = numbers(4096, 7168, seed=8), segments(4096, 256, 8)
    both = ours.both(x, counts_E, power_of_two=power_of_two)
    expected = reference.both(on_cpu(x), on_cpu(counts_E), power_of_two=power_of_two)
    for result, wanted in zip(both, expected, strict=True):
        assert_same(result, wanted)
    weight = numbers(2, 4096, 7168, seed=9, dtype=torch.float32)
    for result, wanted in zip(
        ours.blocks(weight, power_of_two=power_of_two),
        reference.blocks(on_cpu(weight), power_of_two=power_of_two),
        strict=True,
    ):
        assert_same(result, wanted)
