"""LogFMT against a search through all levels in float64, and its errors beside E4M3 and E5M2."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.kernels.logfmt import LogFmt, decode, encode

BITS = st.sampled_from([4, 8, 10])
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 300))


def book(numbers: np.ndarray, bits: int) -> np.ndarray:
    """What the levels of one tile stand for, by the definition, in float64."""
    sizes = np.abs(numbers[numbers != 0])
    if not len(sizes):
        return np.zeros(1)
    high = math.log(sizes.max())
    low = max(math.log(sizes.min()), high - math.log(2.0**32))
    step = (high - low) / (2 ** (bits - 1) - 2)
    return np.append(0.0, np.exp(low + step * np.arange(2 ** (bits - 1) - 1)))


def uneven(shape: tuple[int, ...], seed: int, spread: float) -> Tensor:
    """Numbers of very different sizes, some zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * torch.exp(spread * torch.randn(shape, generator=generator))
    return torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, x)


@given(SHAPES, BITS, st.integers(0, 1000), st.sampled_from([0.0, 2.0, 12.0]))
def test_each_number_goes_to_the_nearest_level(
    shape: tuple[int, int], bits: int, seed: int, spread: float
) -> None:
    """Nearest to the number itself; FP32 logarithms leave a few millionths of the number."""
    x = uneven(shape, seed, spread)
    back = decode(encode(x, bits)).double().numpy()
    values = x.double().numpy()
    for row, tile in np.ndindex(shape[0], -(-shape[1] // 128)):
        columns = slice(128 * tile, 128 * tile + 128)
        part, found = values[row, columns], back[row, columns]
        levels = book(part, bits)
        best = np.abs(np.abs(part)[:, None] - levels).min(1)
        off = np.abs(part - found)
        assert (off <= best + 1e-5 * np.abs(part)).all()
        is_level = np.abs(np.abs(found)[:, None] - levels) <= 1e-5 * levels
        assert is_level.any(1).all()


@given(SHAPES, BITS, st.integers(0, 1000))
def test_the_largest_and_the_smallest_number_stay(
    shape: tuple[int, int], bits: int, seed: int
) -> None:
    x = uneven(shape, seed, 1.0)[:, :128]
    q = encode(x, bits)
    back = decode(q)
    sizes, top = x.abs(), 2 ** (bits - 1) - 1
    for row in range(shape[0]):
        if not sizes[row].any():
            continue
        most = int(sizes[row].argmax())
        least = int(torch.where(sizes[row] == 0, torch.inf, sizes[row]).argmin())
        for place in (most, least):
            assert float(back[row, place]) == pytest.approx(float(x[row, place]), rel=1e-5)
        if sizes[row, most] != sizes[row, least]:
            assert int(q.codes[row, most]) & top == top
            assert int(q.codes[row, least]) & top == 1


def test_the_middle_of_two_levels_is_that_of_numbers() -> None:
    """Four bits of 1 .. 64 are the powers of two: 2 and 4 meet at 3, their logarithms at 2.83."""
    x = torch.tensor([[1.0, 64.0, 2.9, -2.9, 3.1, -3.1, 47.0, 49.0]])
    assert decode(encode(x, 4)).round(decimals=3).tolist() == [[1, 64, 2, -2, 4, -4, 32, 64]]


def test_the_range_is_32_binades() -> None:
    """Below half of the lowest level is zero."""
    low = 2.0**-32
    x = torch.tensor([[1.0, 1e-30, 0.49 * low, 0.51 * low, -0.51 * low, low]])
    q = encode(x, 8)
    assert float(q.low) == pytest.approx(-32 * math.log(2), rel=1e-6)
    assert (q.codes & 127).tolist() == [[127, 0, 0, 1, 1, 1]]
    back = decode(q)[0].double()
    wanted = [1.0, 0.0, 0.0, low, -low, low]
    assert back.tolist() == pytest.approx(wanted, rel=1e-5)


def test_zeros_and_tiles_of_one_magnitude() -> None:
    x = torch.zeros(1, 300)
    x[0, 130:140] = -0.75
    q = encode(x, 8)
    assert torch.equal(q.codes[0] & 127, (x[0] != 0).short())
    torch.testing.assert_close(decode(q), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_tile_that_is_not_finite_becomes_nan_as_a_whole(bad: float) -> None:
    x = torch.ones(2, 300)
    x[:, 5], x[1, 150], x[1, 200] = 0, 0, bad
    hit = torch.zeros(2, 300, dtype=torch.bool)
    hit[1, 128:256] = True
    back = decode(encode(x, 8))
    assert torch.equal(back.isnan(), hit)
    torch.testing.assert_close(back[~hit], x[~hit], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [4, 8, 10, 15])
def test_codes_have_as_many_bits_as_they_say(bits: int) -> None:
    q = encode(uneven((4, 2, 200), 0, 2.0), bits)
    assert q.codes.dtype == torch.int16
    assert q.codes.shape == (4, 2, 200)
    assert q.low.shape == q.step.shape == (4, 2, 2)
    assert int(q.codes.min()) >= 0
    assert 2 ** (bits - 1) < int(q.codes.max()) < 2**bits
    assert decode(q, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [0, 3, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(BadInput, match="4 to 15"):
        encode(torch.ones(1, 1), bits)


def test_decode_is_the_formula() -> None:
    q = LogFmt(torch.tensor([[0, 1, 3, 8 + 3]]).short(), torch.zeros(1, 1), torch.ones(1, 1), 4)
    assert decode(q).tolist()[0] == pytest.approx([0, 1, math.exp(2), -math.exp(2)], rel=1e-6)


def error(x: Tensor, back: Tensor) -> float:
    return float((back.double() - x.double()).square().mean())


def by_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3 or E5M2 with the same tiles, amax on the largest number of the format."""
    tiles = x.unflatten(-1, (-1, 128))
    scales = tiles.abs().amax(-1, keepdim=True) / torch.finfo(dtype).max
    return ((tiles / scales).to(dtype).float() * scales).flatten(-2)


def activations(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 64, 4096, generator=generator)
    channels = torch.rand(4096, generator=generator)
    return {
        "gaussian": x,
        "outlier channels": x * torch.where(channels < 0.01, 30.0, 1.0),
        "swiglu": torch.nn.functional.silu(x) * y,
        "swiglu of wide gates": torch.nn.functional.silu(4 * x) * y,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "share"), [("gaussian", 0.35), ("outlier channels", 0.65), ("swiglu", 0.7)]
)
def test_eight_bits_beat_e4m3_and_e5m2(kind: str, share: float) -> None:
    """In squared error, which is ``share`` of E4M3's at most."""
    x = activations(kind)
    ours = error(x, decode(encode(x, 8)))
    assert ours < share * error(x, by_cast(x, torch.float8_e4m3fn))
    assert ours < 0.2 * error(x, by_cast(x, torch.float8_e5m2))
    assert error(x, decode(encode(x, 10))) < 0.08 * ours


def test_eight_bits_lose_to_e4m3_where_a_tile_spans_too_much() -> None:
    """Where numbers fall to 2^-17 of the largest, equal steps of the logarithm become coarse."""
    x = activations("swiglu of wide gates")
    ours, e4m3 = error(x, decode(encode(x, 8))), error(x, by_cast(x, torch.float8_e4m3fn))
    assert e4m3 < ours < error(x, by_cast(x, torch.float8_e5m2))
