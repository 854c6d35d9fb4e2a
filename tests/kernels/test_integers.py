"""Integers with group scales: error bounds, fixed points, ragged rows, and the packed words."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ziphius.kernels.integers import (
    QuantizedWeight,
    choose_scales,
    dequantize,
    groups,
    pack,
    quantize,
    spread,
    stored_bytes,
    unpack,
)

BITS = st.sampled_from([4, 8])
SIZES = st.sampled_from([-1, 1, 2, 7, 16, 128])


def matrix(rows: int, width: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    """Weights whose size differs much from place to place."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(rows, width, generator=generator))
    return torch.randn(rows, width, generator=generator) * sizes


@given(BITS, SIZES, st.integers(1, 9), st.integers(1, 70), st.integers(0, 1000))
def test_no_weight_is_off_by_more_than_half_a_step(
    bits: int, group_size: int, rows: int, width: int, seed: int
) -> None:
    weight = matrix(rows, width, seed)
    codes, scales = quantize(weight, bits, group_size)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.bfloat16
    assert scales.shape == (rows, groups(width, group_size))
    assert int(codes.min()) >= -(2 ** (bits - 1))
    assert int(codes.max()) < 2 ** (bits - 1)
    back = dequantize(codes, scales, group_size, torch.float64)
    steps = spread(scales.double(), width, group_size)
    assert ((back - weight.double()).abs() <= steps / 2 * (1 + 1e-6)).all()


@given(BITS, SIZES, st.integers(1, 70), st.integers(0, 1000))
def test_a_second_time_changes_nothing(bits: int, group_size: int, width: int, seed: int) -> None:
    codes, scales = quantize(matrix(5, width, seed), bits, group_size)
    back = dequantize(codes, scales, group_size, torch.float32)
    again = quantize(back, bits, group_size)
    assert torch.equal(dequantize(*again, group_size, torch.float32), back)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_is_sacrificed_for_the_others(bits: int) -> None:
    """In a group of many equal weights a smaller step would pay, were it not for the largest."""
    weight = matrix(500, 128, seed=2, spread=0.0)
    codes, scales = quantize(weight, bits, 128)
    off = (dequantize(codes, scales, 128, torch.float32) - weight).abs()
    assert (off <= scales.float() / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_error_is_never_above_that_of_the_plain_scale(bits: int) -> None:
    weight, most = matrix(64, 256, seed=1, spread=0.0), 2 ** (bits - 1) - 1
    tiles = weight.unflatten(1, (2, 128))
    step = tiles.abs().amax(-1, keepdim=True).div(most).bfloat16().float()
    plain = ((tiles / step).round().clamp(-most - 1, most) * step - tiles).square().sum()
    codes, scales = quantize(weight, bits, 128)
    ours = (dequantize(codes, scales, 128, torch.float32) - weight).square().sum()
    assert ours <= plain
    if bits == 4:
        assert ours < 0.93 * plain


def test_zero_groups_have_scale_one_and_code_zero() -> None:
    weight = torch.zeros(3, 40)
    weight[1, 33] = 2.0
    codes, scales = quantize(weight, 4, 16)
    assert scales[0].tolist() == [1, 1, 1]
    assert scales[1, :2].tolist() == [1, 1]
    assert torch.equal(dequantize(codes, scales, 16, torch.float32)[[0, 2]], weight[[0, 2]])


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_values(size: float, bits: int) -> None:
    weight = torch.tensor([[size, -size, size / 2, 0.0], [size] * 4, [-size] * 4])
    codes, scales = quantize(weight, bits, -1)
    back = dequantize(codes, scales, -1, torch.float64)
    steps = scales.double()
    assert scales.isfinite().all()
    assert ((back - weight.double()).abs() <= steps / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(2, 300)
    weight[1, 299] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(weight, 8, 128)


@pytest.mark.parametrize(("bits", "size"), [(3, 128), (16, 128), (4, 0), (8, -2)])
def test_impossible_forms_are_refused(bits: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"bits|group size"):
        quantize(torch.ones(2, 2), bits, size)


def test_scales_ignore_what_a_ragged_group_is_filled_with() -> None:
    weight = torch.full((1, 5), 7.0)
    assert choose_scales(weight, 4, 4).tolist() == [[1.0, 1.0]]


# Packing


@given(BITS, st.integers(1, 5), st.integers(1, 40), st.integers(0, 1000))
def test_packing_there_and_back(bits: int, rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, width), generator=generator).to(torch.int8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, -(-width * bits // 32))
    assert torch.equal(unpack(words, bits, width), codes)


def test_words_worked_by_hand() -> None:
    """The first input is in the lowest bits; codes are raised by 8 or 128; a rest is zero."""
    four = torch.tensor([[-8, -7, 0, 7, 1, -1, 2, 3, -2]], dtype=torch.int8)
    expected = [0xBA79F810 - 2**32, 0x6]
    assert pack(four, 4).tolist() == [expected]
    eight = torch.tensor([[-128, 127, 0, 1, -1]], dtype=torch.int8)
    assert pack(eight, 8).tolist() == [[0x8180FF00 - 2**32, 0x7F]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [7, 40])
def test_packing_is_that_of_the_library(bits: int, width: int) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = quantize(matrix(6, width, seed=3), bits, 16).codes_OI
    words = library.pack_to_int32(codes, bits)
    assert torch.equal(pack(codes, bits), words)
    assert torch.equal(
        unpack(words, bits, width), library.unpack_from_int32(words, bits, codes.shape)
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [37, 64])
def test_stored_bytes_are_codes_as_kernels_read_them(bits: int, width: int) -> None:
    codes, scales = quantize(matrix(6, width, seed=4), bits, 16)
    words = pack(codes, bits)
    stored = stored_bytes(words, bits, width)
    assert stored.data_ptr() == words.data_ptr()
    weight = QuantizedWeight(stored, scales, 16, bits, (6, width))
    row, column = 3, 35
    byte = int(stored[row, column] if bits == 8 else stored[row, column // 2] >> 4)
    assert byte - 2 ** (bits - 1) == codes[row, column]
    expected = dequantize(codes, scales, 16, torch.float32)
    assert torch.equal(weight.dequantize(torch.float32), expected)
