"""E5M6 against a list of all its 4096 numbers in float64, and its bytes against integers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from ziphius.kernels.e5m6 import E5M6, decode, encode

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 300))


def number(code: int) -> float:
    """The definition of the format."""
    exponent, fraction = code >> 6 & 31, code & 63
    if exponent == 31:
        size = math.nan if fraction else math.inf
    elif exponent == 0:
        size = 2.0**-14 * fraction / 64
    else:
        size = 2.0 ** (exponent - 15) * (1 + fraction / 64)
    return -size if code >> 11 else size


NUMBERS = np.array([number(code) for code in range(4096)])
SIZES = NUMBERS[: 31 << 6]


def nearest(sizes: np.ndarray) -> np.ndarray:
    """Codes of the nearest numbers, the even code of two that are as near: float64, by search."""
    above = np.searchsorted(SIZES, sizes).clip(1, len(SIZES) - 1)
    below = above - 1
    up, down = SIZES[above] - sizes, sizes - SIZES[below]
    even = np.where(above % 2 == 0, above, below)
    return np.where(up == down, even, np.where(up < down, above, below))


def codes_of(q: E5M6, width: int) -> np.ndarray:
    """The codes, read from the bytes as the layout says."""
    packed = q.packed.numpy().astype(np.int64)
    first, middle, last = packed[..., 0::3], packed[..., 1::3], packed[..., 2::3]
    codes = np.stack((first | (middle & 15) << 8, middle >> 4 | last << 4), -1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :width]


def expected(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scale bytes of ``x`` ``[R, C]``, one tile after the other in float64."""
    values = x.float().double().numpy()
    codes = np.zeros(values.shape, dtype=np.int64)
    scales = np.zeros((len(values), -(-values.shape[1] // 128)), dtype=np.int64)
    for row, tile in np.ndindex(scales.shape):
        columns = slice(128 * tile, 128 * tile + 128)
        part = values[row, columns]
        exponent = math.ceil(
            math.log2(max(np.abs(part).max(), np.float64(np.float32(1e-4))) / 65024)
        )
        scales[row, tile] = 127 + exponent
        codes[row, columns] = nearest(np.abs(part) / 2.0**exponent) | np.signbit(part) * 2048
    return codes, scales


def uneven(shape: tuple[int, ...], seed: int, spread: float = 3.0) -> Tensor:
    """Numbers of very different sizes, some zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(shape, generator=generator))
    x = torch.randn(shape, generator=generator) * sizes
    return torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, x)


@given(SHAPES, st.integers(0, 1000), st.sampled_from([1.0, 6.0]))
def test_codes_and_scales_equal_the_search_in_float64(
    shape: tuple[int, int], seed: int, spread: float
) -> None:
    x = uneven(shape, seed, spread)
    q = encode(x)
    codes, scales = expected(x)
    assert np.array_equal(q.scales.numpy(), scales)
    assert np.array_equal(codes_of(q, shape[1]), codes)


def test_every_finite_code_and_every_middle_between_two() -> None:
    """Middles go to the even code, and what is next to a middle to its side."""
    middles = (SIZES[1:] + SIZES[:-1]) / 2
    near = np.concatenate((np.nextafter(middles, 0, dtype=np.float32), middles, SIZES))
    near = np.concatenate((near, np.nextafter(middles.astype(np.float32), np.float32(np.inf))))
    # A tile's largest number sets its scale: 65024 keeps it at one.
    tiles = torch.tensor(near, dtype=torch.float32).reshape(-1, 1)
    x = torch.cat((tiles, -tiles, torch.full_like(tiles, 65024.0)), 1)
    q = encode(x)
    assert (q.scales == 127).all()
    wanted = nearest(near)
    assert np.array_equal(codes_of(q, 3)[:, 0], wanted)
    assert np.array_equal(codes_of(q, 3)[:, 1], wanted | 2048)
    assert set(range(31 << 6)) == set(wanted.tolist())


def test_every_code_decodes_to_its_number() -> None:
    codes = np.arange(4096)
    pairs = codes[0::2] | codes[1::2] << 12
    packed = np.stack((pairs & 255, pairs >> 8 & 255, pairs >> 16), -1).reshape(1, -1)
    for byte in (98, 127, 130):
        q = E5M6(torch.tensor(packed, dtype=torch.uint8), torch.full((1, 32), byte).to(torch.uint8))
        for dtype in DTYPES[:3]:
            found = decode(q, 4096, dtype).double().numpy()[0]
            np.testing.assert_array_equal(found, NUMBERS * 2.0 ** (byte - 127))


def test_bytes_of_a_pair() -> None:
    """1 is 2^15 times its scale: the codes are 0x780 and, negative, 0xF80, low bits first."""
    q = encode(torch.tensor([[1.0, -1.0, 1.0]]))
    assert q.scales.tolist() == [[127 - 15]]
    assert q.packed.tolist() == [[0x80, 0x07, 0xF8, 0x80, 0x07, 0x00]]
    assert q.packed.dtype == q.scales.dtype == torch.uint8
    assert q.nbytes == 7


@given(SHAPES, st.integers(0, 1000))
def test_a_second_time_changes_nothing(shape: tuple[int, int], seed: int) -> None:
    once = decode(encode(uneven(shape, seed)), shape[1])
    assert torch.equal(decode(encode(once), shape[1]), once)


@given(SHAPES, st.integers(0, 1000), st.sampled_from(DTYPES))
def test_relative_error_is_at_most_2_to_the_minus_7(
    shape: tuple[int, int], seed: int, dtype: torch.dtype
) -> None:
    x = uneven(shape, seed, spread=2.0).to(dtype).double()
    back = decode(encode(x), shape[1], torch.float64)
    assert ((back - x).abs() <= 2.0**-7 * x.abs()).all()


@given(SHAPES, st.integers(0, 1000))
def test_tiny_numbers_are_off_by_a_sliver_of_the_largest(shape: tuple[int, int], seed: int) -> None:
    x = uneven(shape, seed, spread=12.0)
    tiles = torch.nn.functional.pad(x, (0, -shape[1] % 128)).unflatten(-1, (-1, 128)).double()
    largest = tiles.abs().amax(-1, keepdim=True).expand_as(tiles).flatten(-2)[..., : shape[1]]
    off = (decode(encode(x), shape[1], torch.float64) - x.double()).abs()
    sliver = (2.0**-35 * largest).clamp(min=2.0**-50)
    assert (off <= torch.maximum(2.0**-7 * x.double().abs(), sliver)).all()
    small = x.double().abs() < 2.0**-28 * largest
    assert (off <= sliver)[small].all()


@given(SHAPES, st.integers(0, 1000), st.integers(-6, 90))
def test_a_power_of_two_moves_the_scale_alone(
    shape: tuple[int, int], seed: int, power: int
) -> None:
    x = uneven(shape, seed)
    # No tile may come near the smallest amax.
    x[:, ::128] += torch.copysign(torch.tensor(1.0), x[:, ::128])
    plain, scaled = encode(x), encode(x * 2.0**power)
    assert torch.equal(plain.packed, scaled.packed)
    assert torch.equal(plain.scales.int() + power, scaled.scales.int())


@given(st.integers(1, 2**23 - 1))
@example(0x7E0000)
@example(0x7E0001)
def test_the_largest_number_is_in_the_upper_half_of_the_codes(fraction: int) -> None:
    x = torch.tensor([[1 + fraction * 2.0**-23]])
    q = encode(x)
    code = int(codes_of(q, 1)[0, 0])
    # 65024 and its half are 0x7BF and 0x77F.
    assert 0x77F <= code <= 0x7BF
    assert int(q.scales) - 127 == (-14 if fraction > 0x7E0000 else -15)


def test_extremes_of_fp32() -> None:
    """What rounds up to 2^128 is infinity in FP32, as in BF16; nothing else overflows."""
    below = 2.0**127 * (1 + 126.9 / 128)
    x = torch.tensor([[below, 1.0, 1e-45], [torch.finfo(torch.float32).max, 1.0, -1e-45]])
    q = encode(x)
    assert q.scales.tolist() == [[240], [240]]
    assert decode(q, 3).tolist() == [[2.0**127 * (1 + 63 / 64), 0, 0], [math.inf, 0, 0]]
    assert decode(q, 3, torch.float64)[1, 0] == 2.0**128


def test_zero_tiles_keep_their_signs() -> None:
    x = torch.tensor([[0.0, -0.0] * 100])
    q = encode(x)
    back = decode(q, 200)
    assert torch.equal(back.signbit(), x.signbit())
    assert (back == 0).all()
    # 1e-4 / 65024 rounded up to a power of two.
    assert q.scales.tolist() == [[127 - 29] * 2]


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_tile_that_is_not_finite_becomes_nan_as_a_whole(bad: float) -> None:
    x = torch.ones(2, 300)
    x[:, 5] = 0
    x[1, 200] = bad
    q = encode(x)
    back = decode(q, 300)
    hit = torch.zeros(2, 300, dtype=torch.bool)
    hit[1, 128:256] = True
    assert torch.equal(back.isnan(), hit)
    assert torch.equal(q.scales == 255, hit[:, ::128])
    codes = codes_of(q, 300)
    assert (codes[1, 128:256] >> 6 & 31 == 31).all()
    assert (codes[1, 128:256] & 63 != 0).all()


@pytest.mark.parametrize("width", [1, 2, 127, 128, 129, 255])
def test_shapes(width: int) -> None:
    x = uneven((2, 3, width), 0).requires_grad_()
    q = encode(x)
    assert q.packed.shape == (2, 3, (width + 1) // 2 * 3)
    assert q.scales.shape == (2, 3, -(-width // 128))
    assert not q.packed.requires_grad
    back = decode(q, width, torch.bfloat16)
    assert back.shape == x.shape
    assert back.dtype == torch.bfloat16
    flat = encode(x.flatten(0, 1))
    assert torch.equal(flat.packed, q.packed.flatten(0, 1))


def test_rows_that_do_not_lie_together() -> None:
    x = uneven((130, 6), 1)
    turned = encode(x.T)
    assert torch.equal(turned.packed, encode(x.T.contiguous()).packed)


def test_no_rows() -> None:
    q = encode(torch.empty(0, 130))
    assert q.packed.shape == (0, 195)
    assert decode(q, 130).shape == (0, 130)


def test_it_takes_three_quarters_of_bfloat16() -> None:
    x = torch.zeros(64, 2048, dtype=torch.bfloat16)
    assert encode(x).nbytes < 0.76 * x.nbytes
