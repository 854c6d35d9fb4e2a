"""FP8 blocks against a loop in float64, and against vectors worked by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ziphius.checkpoint.fp8 import dequantize_blocks, is_quantized, quantize_blocks
from ziphius.config.errors import BadInput

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Every finite non-negative E4M3 number, from the definition of the format: 4 exponent bits with
# bias 7, 3 fraction bits, no infinity, and 1111.111 is NaN.
E4M3_GRID = sorted(
    (fraction / 8 if exponent == 0 else 1 + fraction / 8) * 2.0 ** (max(exponent, 1) - 7)
    for exponent in range(16)
    for fraction in range(8)
    if (exponent, fraction) != (15, 7)
)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Weights whose size differs much from block to block, so that a wrong scale shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(4 * torch.randn(-(-rows // 128), -(-columns // 128), generator=generator))
    spread = sizes.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    return torch.randn(rows, columns, generator=generator) * spread


def slow_dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One element after another, in float64; exact, as the factors have 4 and 24 bits."""
    numbers, scales = q.to(torch.float64).tolist(), scale.to(torch.float64).tolist()
    product = [
        [value * scales[i // 128][j // 128] for j, value in enumerate(row)]
        for i, row in enumerate(numbers)
    ]
    return torch.tensor(product, dtype=torch.float64)


def nearest_e4m3(value: float) -> float:
    """The nearest number of the grid; of two equally near ones the even one."""
    size = min(abs(value), E4M3_GRID[-1])
    best = min(range(len(E4M3_GRID)), key=lambda i: (abs(E4M3_GRID[i] - size), i % 2))
    return math.copysign(E4M3_GRID[best], value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_multiplies_as_a_float64_loop_does(dtype: torch.dtype) -> None:
    q = (weights(200, 300) / 1000).clamp(-448, 448).to(E4M3)
    scale = torch.rand(2, 3) * 0.01 + 1e-4
    expected = slow_dequantize(q, scale)
    if dtype != torch.float64:  # the released code makes the product in float32
        expected = expected.to(torch.float32).to(dtype)
    result = dequantize_blocks(q, scale, dtype)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 290), columns=st.integers(1, 290), seed=st.integers(0, 100))
def test_dequantize_handles_every_ragged_shape(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Within E4M3's range: torch before 2.13 makes NaN of what is beyond, which equals nothing.
    q = (100 * torch.randn(rows, columns, generator=generator)).clamp(-448, 448).to(E4M3)
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator)
    result = dequantize_blocks(q, scale, torch.float64)
    assert torch.equal(result, slow_dequantize(q, scale))


def test_the_scale_multiplies_and_does_not_divide() -> None:
    q = torch.full((128, 256), 2.0).to(E4M3)
    scale = torch.tensor([[0.25, 8.0]])
    result = dequantize_blocks(q, scale, torch.float32)
    assert result[0, 0] == 0.5
    assert result[127, 255] == 16.0


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 100))
def test_quantize_scales_are_the_largest_value_of_each_block(
    rows: int, columns: int, seed: int
) -> None:
    w = weights(rows, columns, seed)
    q, scale = quantize_blocks(w)
    assert q.dtype == E4M3
    assert q.shape == w.shape
    assert scale.dtype == torch.float32
    assert scale.shape == (-(-rows // 128), -(-columns // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = w[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            amax = max(block.abs().max().item(), 1e-4)
            assert scale[i, j].item() == pytest.approx(amax / 448, rel=1e-6)


def test_quantize_rounds_to_the_nearest_e4m3_number_ties_to_even() -> None:
    w = weights(130, 140, seed=3)
    w[0, :4] = torch.tensor([448.0, 17.0, 19.0, -21.0]) * 4  # grid step 2 there: three ties
    w[:128, :128].clamp_(-4 * 448, 4 * 448)
    q, scale = quantize_blocks(w)
    assert scale[0, 0] == 4
    assert q[0, :4].float().tolist() == [448, 16, 20, -20]
    for i, j in [(i, j) for i in range(0, 130, 7) for j in range(0, 140, 5)]:
        ratio = (w[i, j] / scale[i // 128, j // 128]).item()
        assert q[i, j].item() == nearest_e4m3(ratio)


def test_the_vector_of_the_facts() -> None:
    """Facts, appendix A: linspace(-3, 5, 128) has scale 5/448 and a largest error of 0.16873."""
    w = torch.linspace(-3, 5, 128)[None]
    q, scale = quantize_blocks(w)
    assert scale.item() == pytest.approx(0.011160715, rel=1e-7)
    error = (dequantize_blocks(q, scale, torch.float32) - w).abs().max().item()
    assert error == pytest.approx(0.16873, abs=1e-5)


def test_a_block_of_zeros_and_tiny_values_keeps_the_smallest_scale() -> None:
    w = torch.zeros(128, 256)
    w[:, 128:] = 1e-6
    q, scale = quantize_blocks(w)
    assert scale.tolist() == [pytest.approx([2.232e-7, 2.232e-7], rel=1e-3)]
    assert (q[:, :128].float() == 0).all()
    assert dequantize_blocks(q, scale, torch.float32)[0, 200] == pytest.approx(1e-6, rel=0.07)


def test_kv_a_proj_has_five_by_fifty_six_scales() -> None:
    """576 x 7168: the last row of blocks covers 64 rows (facts 4.2)."""
    w = weights(576, 7168, seed=1).to(torch.bfloat16)
    q, scale = quantize_blocks(w)
    assert scale.shape == (5, 56)
    assert scale[4, 55].item() == pytest.approx(w[512:, 7040:].abs().max().item() / 448)
    back = dequantize_blocks(q, scale, torch.bfloat16)
    scale_of = scale.repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)
    error, size = (back.float() - w.float()).abs(), w.float().abs()
    # Half a step of three fraction bits, or of a subnormal; then half a step of bfloat16.
    assert (error <= torch.maximum(size * 2**-4, scale_of * 2**-10) + size * 2**-8).all()


def test_quantize_a_second_time_changes_nothing() -> None:
    q, scale = quantize_blocks(weights(200, 150))
    again, scale_again = quantize_blocks(dequantize_blocks(q, scale, torch.float32))
    assert torch.equal(q.float(), again.float())
    torch.testing.assert_close(scale, scale_again, rtol=1e-6, atol=0)


def test_strided_input_gives_the_same_blocks() -> None:
    w = weights(150, 260)
    q, scale = quantize_blocks(w.t().contiguous().t())
    expected_q, expected_scale = quantize_blocks(w)
    assert torch.equal(q.float(), expected_q.float())
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_quantize_refuses_what_fp8_cannot_hold(bad: float) -> None:
    w = torch.zeros(140, 10)
    w[133, 5] = bad
    with pytest.raises(BadInput, match=r"model\.x\.weight: holds NaN or infinity"):
        quantize_blocks(w, name="model.x.weight")


def test_quantize_refuses_vectors_and_integers() -> None:
    with pytest.raises(BadInput, match="a matrix is needed"):
        quantize_blocks(torch.ones(5))
    with pytest.raises(BadInput, match="a matrix is needed"):
        quantize_blocks(torch.ones(5, 5, dtype=torch.int32))


@pytest.mark.parametrize(
    "scale",
    [
        torch.ones(4, 56),  # floor instead of ceil
        torch.ones(56, 5),  # transposed
        torch.ones(280),
        torch.ones(5, 56, dtype=torch.bfloat16),
    ],
)
def test_a_wrong_scale_is_refused_with_what_was_expected(scale: torch.Tensor) -> None:
    q = torch.zeros(576, 7168).to(E4M3)
    with pytest.raises(BadInput, match=r"kv_a\.weight_scale_inv: .* needs float32 \[5, 56\]"):
        dequantize_blocks(q, scale, torch.bfloat16, name="kv_a.weight")


def test_a_missing_scale_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"x\.weight: FP8, but x\.weight_scale_inv is missing"):
        dequantize_blocks(torch.zeros(2, 2).to(E4M3), None, torch.float32, name="x.weight")


def test_a_weight_that_is_not_fp8_is_refused() -> None:
    with pytest.raises(BadInput, match=r"x: bfloat16 \[2, 2\] is no FP8 weight"):
        dequantize_blocks(
            torch.zeros(2, 2, dtype=torch.bfloat16), torch.ones(1, 1), torch.float32, name="x"
        )


def test_is_quantized_pairs_a_weight_with_its_scale() -> None:
    names = {"a.weight", "a.weight_scale_inv", "b.weight"}
    assert is_quantized("a.weight", names)
    assert not is_quantized("b.weight", names)
    assert not is_quantized("a.weight_scale_inv", names)
