"""FP8 in C++: codes and scales are the reference's to the bit, products are near float64's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ziphius.kernels import gemm, grouped_gemm, permute, quantize, swiglu_fp8
from ziphius.kernels.cpu.library import Library
from ziphius.kernels.quantize import CompiledQuantize, Fp8, dequantize

SIZES = settings(max_examples=20, deadline=None)
ROWS = st.sampled_from([1, 2, 15, 63, 64, 65, 127, 128, 129, 200, 300])
WIDTHS = st.sampled_from([1, 3, 16, 31, 48, 64, 65, 127, 128, 130, 256, 300])
COUNTS = st.lists(st.sampled_from([0, 1, 2, 63, 127, 128, 129, 300]), min_size=1, max_size=5)
SEEDS = st.integers(0, 10**6)


def spread(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of very different sizes, with rows of zeros and of what is smaller than 1e-4."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(*shape[:-1], 1, generator=generator).mul(4).exp()
    sizes *= torch.rand(*shape[:-1], 1, generator=generator).gt(0.1)
    return (torch.randn(*shape, generator=generator).pow(3) * sizes).to(dtype)


def assert_equal(found: Fp8, expected: Fp8) -> None:
    """To the bit, but for the sign of NaN."""
    assert found.rows == expected.rows
    assert found.codes.dtype == expected.codes.dtype
    codes, right = (q.codes.view(torch.uint8) for q in (found, expected))
    none = expected.codes.isnan()
    assert torch.equal(found.codes.isnan(), none)
    assert torch.equal(codes.masked_fill(none, 0), right.masked_fill(none, 0))
    torch.testing.assert_close(found.scales, expected.scales, rtol=0, atol=0, equal_nan=True)


# --- quantisers -----------------------------------------------------------------------------------

POWERS = pytest.mark.parametrize("power_of_two", [False, True])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])


@POWERS
@DTYPES
@SIZES
@given(ROWS, WIDTHS, SEEDS)
def test_matrices(
    library: Library, dtype: torch.dtype, power_of_two: bool, M: int, C: int, seed: int
) -> None:
    x_MC, ours = spread(M, C, seed=seed, dtype=dtype), CompiledQuantize(library)
    tiles = quantize.quantize_tiles(x_MC, power_of_two=power_of_two)
    turned = quantize.turn(x_MC, power_of_two=power_of_two)
    assert_equal(ours.tiles(x_MC, power_of_two=power_of_two), tiles)
    assert_equal(ours.turn(x_MC, power_of_two=power_of_two), turned)
    for found, expected in zip(
        ours.both(x_MC, power_of_two=power_of_two), (tiles, turned), strict=True
    ):
        assert_equal(found, expected)
    again = quantize.regroup(tiles, power_of_two=power_of_two)
    assert_equal(ours.regroup(tiles, power_of_two=power_of_two), again)


@POWERS
@SIZES
@given(COUNTS, WIDTHS, SEEDS)
def test_segments(
    library: Library, power_of_two: bool, counts: list[int], C: int, seed: int
) -> None:
    """Experts without rows, and rows that fill no group."""
    ours = CompiledQuantize(library)
    x_MC, counts_E = spread(sum(counts), C, seed=seed, dtype=torch.bfloat16), torch.tensor(counts)
    tiles = quantize.quantize_tiles(x_MC, power_of_two=power_of_two)
    turned = quantize.turn(x_MC, counts_E, power_of_two=power_of_two)
    assert_equal(ours.turn(x_MC, counts_E, power_of_two=power_of_two), turned)
    for found, expected in zip(
        ours.both(x_MC, counts_E, power_of_two=power_of_two), (tiles, turned), strict=True
    ):
        assert_equal(found, expected)
    again = quantize.regroup(tiles, counts_E, power_of_two=power_of_two)
    assert_equal(ours.regroup(tiles, counts_E, power_of_two=power_of_two), again)


@POWERS
@DTYPES
@SIZES
@given(st.sampled_from([None, 1, 3]), ROWS, WIDTHS, SEEDS)
def test_blocks(
    library: Library,
    dtype: torch.dtype,
    power_of_two: bool,
    E: int | None,
    O: int,  # noqa: E741
    I: int,  # noqa: E741
    seed: int,
) -> None:
    weight = spread(*([] if E is None else [E]), O, I, seed=seed, dtype=dtype)
    blocks, turned = CompiledQuantize(library).blocks(weight, power_of_two=power_of_two)
    expected = quantize.quantize_blocks(weight, power_of_two=power_of_two)
    assert_equal(blocks, expected)
    assert_equal(turned, quantize.transpose_blocks(expected))


@POWERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_code_and_every_tie(library: Library, power_of_two: bool, dtype: torch.dtype) -> None:
    """All E4M3 numbers, what lies in the middle between two, and the nearest numbers to that."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = codes[codes.isfinite()].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    near = [torch.nextafter(middles, torch.full_like(middles, s * 1e9)) for s in (-1, 1)]
    given = torch.cat([numbers, middles, *near, torch.tensor([2**-10, -(2**-10), -0.0])])
    rows = torch.zeros(-(-len(given) // 127), 128)
    # The largest number of a row makes its scale 1, so nothing is lost before it is rounded.
    rows[:, 0] = 448.0
    rows[:, 1:] = torch.nn.functional.pad(given, (0, -len(given) % 127)).view(-1, 127)
    x_MC = rows.to(dtype)
    ours = CompiledQuantize(library)
    expected = quantize.quantize_tiles(x_MC, power_of_two=power_of_two)
    assert (expected.scales == 1).all()
    assert_equal(ours.tiles(x_MC, power_of_two=power_of_two), expected)
    assert_equal(
        ours.turn(x_MC.T.contiguous(), power_of_two=power_of_two),
        quantize.turn(x_MC.T, power_of_two=power_of_two),
    )


@POWERS
@pytest.mark.parametrize("odd", [float("inf"), -float("inf"), float("nan"), 3e38, 1e-45, 1e-4])
def test_odd_numbers(library: Library, power_of_two: bool, odd: float) -> None:
    """What is not finite spoils its own groups only; the largest and the smallest are numbers."""
    ours, x_MC = CompiledQuantize(library), torch.randn(130, 140)
    x_MC[3, 5] = x_MC[129, 139] = odd
    x_MC[7] = odd
    for found, expected in (
        (ours.tiles(x_MC, power_of_two=power_of_two), quantize.quantize_tiles),
        (ours.turn(x_MC, power_of_two=power_of_two), quantize.turn),
        (ours.blocks(x_MC, power_of_two=power_of_two)[0], quantize.quantize_blocks),
    ):
        assert_equal(found, expected(x_MC, power_of_two=power_of_two))
    tiles = quantize.quantize_tiles(x_MC, power_of_two=power_of_two)
    again = quantize.regroup(tiles, power_of_two=power_of_two)
    assert_equal(ours.regroup(tiles, power_of_two=power_of_two), again)


def test_views_and_leading_dimensions(library: Library) -> None:
    ours, x = CompiledQuantize(library), spread(2, 5, 300, dtype=torch.bfloat16)
    assert_equal(ours.tiles(x), quantize.quantize_tiles(x))
    for view in (x[0, :, 7:140], x[0].T, x[0, ::2, 1::3]):
        assert_equal(ours.tiles(view), quantize.quantize_tiles(view))
        assert_equal(ours.turn(view), quantize.turn(view))
        assert_equal(
            ours.blocks(view)[1], quantize.transpose_blocks(quantize.quantize_blocks(view))
        )
    assert ours.tiles(x[:0]).codes.shape == (0, 5, 300)


# --- products -------------------------------------------------------------------------------------


def exact(a: Fp8, b: Fp8) -> Tensor:
    return dequantize(a, torch.float64) @ dequantize(b, torch.float64).T


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("form", ["tiles", "blocks"])
@SIZES
@given(ROWS, WIDTHS, st.sampled_from([1, 2, 31, 64, 127, 128, 129, 384, 1000]), SEEDS)
def test_gemm(library: Library, form: str, M: int, N: int, K: int, seed: int) -> None:
    a = quantize.quantize_tiles(spread(M, K, seed=seed))
    make = quantize.quantize_tiles if form == "tiles" else quantize.quantize_blocks
    b = make(torch.randn(N, K))
    found = gemm.gemm_compiled(library, a, b, torch.float32)
    assert_near(found, exact(a, b))
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(gemm.gemm_compiled(library, a, b, dtype), found.to(dtype))


def test_partial_sums_are_scaled_by_their_own_groups(library: Library) -> None:
    """Codes of ones, so that a wrong scale shows as a wrong integer."""
    codes = torch.ones(200, 300).to(torch.float8_e4m3fn)
    scales = 2.0 ** torch.arange(600).view(200, 3).remainder(5)
    a, b = Fp8(codes, scales), Fp8(codes, scales.flip(0))
    blocks = Fp8(codes, scales[:2], 128)
    for right in (b, blocks):
        assert torch.equal(gemm.gemm_compiled(library, a, right, torch.float64), exact(a, right))


def test_every_code_is_multiplied_exactly(library: Library) -> None:
    """Each pair of codes is one number of the result, NaN included."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(1)
    q = Fp8(codes, torch.ones(256, 1))
    expected = codes.float() @ codes.float().T
    found = gemm.gemm_compiled(library, q, q, torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [(300, 2100, 5000), (5, 9000, 1000)])
def test_more_than_is_packed_at_a_time(library: Library, size: tuple[int, int, int]) -> None:
    M, N, K = size
    b = Fp8(torch.randn(N, K).to(torch.float8_e4m3fn), torch.rand(N, -(-K // 128)))
    a = Fp8(torch.randn(M, K).to(torch.float8_e4m3fn), torch.rand(M, -(-K // 128)))
    found = gemm.gemm_compiled(library, a, b, torch.float32)
    assert_near(found, (dequantize(a) @ dequantize(b).T).double(), 3e-6)
    for rows in (slice(0, 1), slice(3, 5), slice(0, 7)):
        some = gemm.gemm_compiled(library, Fp8(a.codes[rows], a.scales[rows]), b, torch.float32)
        assert torch.equal(some, found[rows]), "a row depends on how many there are"


@SIZES
@given(COUNTS, WIDTHS, st.sampled_from([1, 64, 128, 200, 257]), SEEDS)
def test_grouped(library: Library, counts: list[int], N: int, K: int, seed: int) -> None:
    """Experts without rows among them; the gradient of such a one's weight is zero."""
    counts_E = torch.tensor(counts)
    x_MK, dy_MN = spread(sum(counts), K, seed=seed), spread(sum(counts), N, seed=seed + 1)
    a, b = quantize.quantize_tiles(x_MK), quantize.quantize_blocks(torch.randn(len(counts), N, K))
    found = grouped_gemm.grouped_gemm_compiled(library, a, b, counts_E, torch.float32)
    turned = [quantize.turn(x, counts_E) for x in (dy_MN, x_MK)]
    gradient = grouped_gemm.grouped_gemm_along_k_compiled(library, *turned, counts_E, torch.float32)
    assert gradient.shape == (len(counts), N, K)
    starts = quantize.segment_starts(counts_E).tolist()
    for e, rows in enumerate(torch.arange(sum(counts)).split(counts)):
        part = Fp8(a.codes.view(torch.uint8)[rows].view(a.codes.dtype), a.scales[rows])
        assert_near(found[rows], exact(part, Fp8(b.codes[e], b.scales[e], 128)))
        left, right = (
            dequantize(q, torch.float64)[:, starts[e] : starts[e] + counts[e]] for q in turned
        )
        assert_near(gradient[e], left @ right.T)


# --- around the products --------------------------------------------------------------------------


@SIZES
@given(st.integers(1, 40), st.integers(1, 5), WIDTHS, SEEDS)
def test_permuting_tiles(library: Library, N: int, K: int, D: int, seed: int) -> None:
    q, order_M = quantize.quantize_tiles(spread(N, D, seed=seed)), torch.randperm(N * K)
    inverse_M = order_M.argsort()
    found = permute.permute_tiles_compiled(library, q, order_M, inverse_M, K)
    assert_equal(found, permute.permute_tiles(q, order_M, inverse_M, K))


def inputs(M: int, F: int, weighted: bool, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two halves of one matrix, in which no product is exactly between two codes by design."""
    torch.manual_seed(seed)
    gate_MF, up_MF = (torch.randn(M, 2 * F) * 4).bfloat16().chunk(2, -1)
    return gate_MF, up_MF, torch.rand(M) if weighted else None


def assert_nearly_equal(found: Fp8, expected: Fp8) -> None:
    """The exponential's last bit may turn a rounding: rarely, and by one step of a code."""
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-6, atol=0)
    ours, right = (q.codes.view(torch.uint8).int() for q in (found, expected))
    different = ours != right
    assert different.float().mean() <= 1e-3 or different.sum() <= 1
    steps = (ours & 0x7F) - (right & 0x7F)
    assert steps.abs().max() <= 1
    assert ((ours ^ right)[(right & 0x7F) != 0] & 0x80 == 0).all()


@POWERS
@SIZES
@given(st.sampled_from([1, 7, 130, 300]), WIDTHS, st.booleans(), SEEDS)
def test_swiglu_into_tiles(
    library: Library, power_of_two: bool, M: int, F: int, weighted: bool, seed: int
) -> None:
    gate_MF, up_MF, gates_M = inputs(M, F, weighted, seed)
    ours, plain = swiglu_fp8.CompiledSwigluFp8(library), swiglu_fp8.TorchSwigluFp8()
    found = ours.forward(gate_MF, up_MF, gates_M, power_of_two=power_of_two)
    expected = plain.forward(gate_MF, up_MF, gates_M, power_of_two=power_of_two)
    assert_nearly_equal(found[0], expected[0])
    assert_equal(found[1], expected[1])
    assert_equal(found[2], expected[2])
    _, gate, up = expected
    for counts_E in (None, torch.tensor([0, M // 3, M - M // 3])):
        assert_nearly_equal(
            ours.turned(gate, up, gates_M, counts_E, power_of_two=power_of_two),
            plain.turned(gate, up, gates_M, counts_E, power_of_two=power_of_two),
        )


@pytest.mark.parametrize("dhidden", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gradients", [torch.bfloat16, torch.float32])
@SIZES
@given(st.sampled_from([1, 7, 40]), WIDTHS, st.booleans(), SEEDS)
def test_swiglu_back_from_tiles(
    library: Library,
    dhidden: torch.dtype,
    gradients: torch.dtype,
    M: int,
    F: int,
    weighted: bool,
    seed: int,
) -> None:
    gate_MF, up_MF, gates_M = inputs(M, F, weighted, seed)
    ours, plain = swiglu_fp8.CompiledSwigluFp8(library), swiglu_fp8.TorchSwigluFp8()
    _, gate, up = plain.forward(gate_MF, up_MF, gates_M)
    dhidden_MF = torch.randn(M, F).to(dhidden)
    found, expected = torch.full((2, M, 2 * F), float("nan")).to(gradients)
    dgates = [
        version.backward(gate, up, gates_M, dhidden_MF, *out.chunk(2, -1))
        for version, out in ((ours, found), (plain, expected))
    ]
    tolerance = 2**-7 if gradients == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(dgates[0], dgates[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("odd", [float("inf"), -float("inf"), float("nan"), -200.0, 3e38])
def test_swiglu_of_odd_numbers(library: Library, odd: float) -> None:
    gate_MF, up_MF, _ = inputs(130, 64, False, 0)
    gate_MF[3, 5] = odd
    ours, plain = swiglu_fp8.CompiledSwigluFp8(library), swiglu_fp8.TorchSwigluFp8()
    found, expected = (x.forward(gate_MF, up_MF, None) for x in (ours, plain))
    for q, right in zip(found, expected, strict=True):
        assert torch.equal(dequantize(q).isnan(), dequantize(right).isnan())
    rest = torch.arange(130) != 3
    assert_nearly_equal(
        *(
            Fp8(q[0].codes.float()[rest].to(quantize.E4M3), q[0].scales[rest])
            for q in (found, expected)
        )
    )


# --- threads --------------------------------------------------------------------------------------


def test_threads_change_nothing(library: Library) -> None:
    """One expert has nearly all rows, so that threads share it."""
    counts_E = torch.tensor([1, 0, 900, 5, 130])
    x_MK = torch.randn(1036, 300).bfloat16()
    ours, weight = CompiledQuantize(library), torch.randn(5, 70, 300)
    swiglu = swiglu_fp8.CompiledSwigluFp8(library)

    def results() -> list[Tensor]:
        (a, turned), (b, _) = ours.both(x_MK, counts_E), ours.blocks(weight)
        hidden = swiglu.turned(a, a, None, counts_E)
        one = Fp8(b.codes[0], b.scales[0], 128)
        return [
            *(x for q in (a, turned, ours.regroup(a, counts_E), hidden) for x in q[:2]),
            gemm.gemm_compiled(library, a, one, torch.float32),
            grouped_gemm.grouped_gemm_compiled(library, a, b, counts_E, torch.float32),
            grouped_gemm.grouped_gemm_along_k_compiled(
                library, turned, turned, counts_E, torch.float32
            ),
        ]

    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(results())
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x.float(), y.float()) for x, y in zip(found[0], other, strict=True))
