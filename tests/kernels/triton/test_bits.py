"""Codes and scales made inside a kernel are those of the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels import quantize
from ziphius.kernels.triton import bits

BLOCK = 1024


@triton.jit
def _cast(x, out, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, bits.to_e4m3(tl.load(x + at), INTERPRETED))


@triton.jit
def _scale(x, out, POWER_OF_TWO: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    largest = bits.magnitude(tl.load(x + at))
    tl.store(out + at, bits.scale_of_magnitude(largest, POWER_OF_TWO, INTERPRETED))


@triton.jit
def _encode(
    x, scale, out, POWER_OF_TWO: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    codes = bits.encode(tl.load(x + at), tl.load(scale + at), POWER_OF_TWO, INTERPRETED)
    tl.store(out + at, codes)


def padded(x: Tensor, device: torch.device) -> Tensor:
    return torch.cat([x, x.new_zeros(-len(x) % BLOCK)]).to(device)


def codes_of(x: Tensor) -> Tensor:
    """Codes as torch casts them; it alone keeps the sign of a NaN."""
    codes = x.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.masked_fill(x.isnan(), 0x7F)


def every_half_step() -> Tensor:
    """Every E4M3 number, every middle between two, and the FP32 numbers beside each."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    points = torch.cat([numbers, middles])
    raw = points.view(torch.int32)
    beside = torch.cat([raw, raw + 1, (raw - 1).clamp(min=0)]).view(torch.float32)
    beside = beside[beside <= 448]
    return torch.cat([beside, -beside])


def test_every_code_and_every_tie_is_cast_as_torch_casts_it(device: torch.device) -> None:
    random = torch.randn(20_000) * torch.logspace(-12, 2, 20_000)
    x = torch.cat([every_half_step(), random, torch.tensor([float("nan"), -0.0, 1e-40])])
    on_device = padded(x, device)
    out = torch.empty_like(on_device, dtype=torch.uint8)
    _cast[(len(out) // BLOCK,)](on_device, out, bits.interpreted(), BLOCK)
    assert torch.equal(out.cpu()[: len(x)], codes_of(x))


def test_beyond_the_largest_it_saturates(device: torch.device) -> None:
    x = padded(torch.tensor([449.0, 464.0, 470.0, 1e30, -1e30, float("inf")]), device)
    out = torch.empty_like(x, dtype=torch.uint8)
    _cast[(1,)](x, out, bits.interpreted(), BLOCK)
    assert out.cpu()[:6].tolist() == [0x7E, 0x7E, 0x7E, 0x7E, 0xFE, 0x7E]


@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales_are_the_references(device: torch.device, power_of_two: bool) -> None:
    edges = torch.tensor([0.0, 1e-4, 448.0, 447.99997, 896.0, 3.4e38, 1e-40])
    bad = torch.tensor([float("inf"), float("nan")])
    amax = torch.cat([edges, bad, torch.logspace(-8, 30, 3000), 448 * 2.0 ** torch.arange(-20, 20)])
    on_device = padded(amax, device)
    out = torch.empty_like(on_device)
    _scale[(len(out) // BLOCK,)](on_device, out, power_of_two, bits.interpreted(), BLOCK)
    expected = quantize.scales_of(amax, power_of_two=power_of_two)
    torch.testing.assert_close(out.cpu()[: len(amax)], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("power_of_two", [False, True])
def test_quotients_are_rounded_as_divisions(device: torch.device, power_of_two: bool) -> None:
    """Beside every tie, where the last bit of the quotient decides; and of an infinite scale."""
    generator = torch.Generator().manual_seed(1)
    steps = every_half_step().repeat(40)
    amax = torch.rand(len(steps), generator=generator) * 10.0 ** torch.randint(
        -4, 20, (len(steps),), generator=generator
    )
    scale = quantize.scales_of(amax, power_of_two=power_of_two)
    raw = (steps * scale).view(torch.int32)
    raw += torch.randint(-1, 2, raw.shape, generator=generator, dtype=torch.int32) * (raw != 0)
    x = torch.cat([raw.view(torch.float32), torch.tensor([-0.0, 1.0, -2.0, float("inf")])])
    scale = torch.cat([scale, torch.tensor([1.0, *[float("inf")] * 3])])
    expected = codes_of((x / scale).clamp(-448, 448))
    inputs = padded(x, device), padded(scale, device)
    out = torch.empty_like(inputs[0], dtype=torch.uint8)
    _encode[(len(out) // BLOCK,)](*inputs, out, power_of_two, bits.interpreted(), BLOCK)
    assert torch.equal(out.cpu()[: len(x)], expected)


def hard_quotients() -> tuple[Tensor, Tensor]:
    """Numbers and scales whose quotients lie beside a tie of codes by as little as there is.

    In integers: a scale ``S`` of 24 bits, a tie of ``k / 16``. ``X / S`` is within a hair of half a
    last place of the tie only if ``S`` is within a few of a multiple of 2^19.
    """
    multiple = torch.arange(16, 33)[:, None] * 2**19
    scale = (multiple + torch.arange(-64, 65)).flatten()
    scale = scale[(scale >= 2**23) & (scale < 2**24)]
    tie = torch.arange(16, 32)
    product = scale[:, None, None] * tie[None, :, None]
    step = torch.where(product >= 2**28, 32, 16)
    x = (product // step + torch.arange(-2, 4)) * step
    return x.flatten().float() / 16, scale[:, None, None].expand_as(x).flatten().float()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_quotients_beside_ties_by_the_least_there_is(device: torch.device) -> None:
    x, scale = hard_quotients()
    expected = codes_of(x / scale)
    inputs = padded(x, device), padded(scale, device)
    out = torch.empty_like(inputs[0], dtype=torch.uint8)
    _encode[(len(out) // BLOCK,)](*inputs, out, False, bits.interpreted(), BLOCK)
    assert torch.equal(out.cpu()[: len(x)], expected)


@pytest.mark.parametrize("places", range(-2, 3))
def test_one_correction_of_a_product_with_the_reciprocal_is_on_the_divisions_side(
    places: int,
) -> None:
    """What the kernel computes on a GPU, here: FP64 holds these products and sums exactly.

    The GPU's own reciprocal may be off by some last places.
    """
    x, scale = (t.double() for t in hard_quotients())
    own = ((1 / scale).float().view(torch.int32) + places).view(torch.float32).double()
    reciprocal = (own + (1 - scale * own).float().double() * own).float().double()
    first = (x * reciprocal).float().double()
    rest = (first * scale - x).float().double()
    quotient = (first - rest * reciprocal).float()
    assert torch.equal(codes_of(quotient), codes_of((x / scale).float()))
    # Without the correction some are not: these are hard.
    assert not torch.equal(codes_of(first.float()), codes_of((x / scale).float()))


def test_a_448th_in_two_parts_divides_every_mantissa() -> None:
    """What the kernel computes on a GPU, here, of every number from 1 to 2."""
    for amax in torch.arange(2**23, 2**24).split(2**20):
        wide = amax.double()
        first, rest = bits.FIRST_448.value, bits.REST_448.value
        quotient = (wide * first + (wide * rest).float().double()).float()
        assert torch.equal(quotient, amax.float() / torch.tensor(448.0))
