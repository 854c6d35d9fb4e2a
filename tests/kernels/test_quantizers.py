"""The quantisers as one object: pairs from one reading are what two readings give."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ziphius.kernels.quantize import (
    VERSIONS,
    Fp8,
    TorchQuantize,
    dequantize,
    quantize_blocks,
    quantize_tiles,
    regroup,
    turn,
)

reference = TorchQuantize()
few = settings(max_examples=25)


def same(a: Fp8, b: Fp8) -> bool:
    codes = torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8))
    return codes and torch.equal(a.scales, b.scales) and a.rows == b.rows


@few
@given(st.integers(1, 200), st.integers(1, 200), st.booleans(), st.booleans())
def test_each_is_the_function_of_its_name(
    M: int, C: int, segmented: bool, power_of_two: bool
) -> None:
    x_MC = torch.randn(M, C)
    counts_E = torch.tensor([M // 3, 0, M - M // 3]) if segmented else None
    how = {"power_of_two": power_of_two}
    tiles, turned = quantize_tiles(x_MC, **how), turn(x_MC, counts_E, **how)
    assert same(reference.tiles(x_MC, **how), tiles)
    assert same(reference.turn(x_MC, counts_E, **how), turned)
    both = reference.both(x_MC, counts_E, **how)
    assert same(both[0], tiles)
    assert same(both[1], turned)
    assert same(reference.regroup(tiles, counts_E, **how), regroup(tiles, counts_E, **how))


@few
@given(st.sampled_from([(), (3,)]), st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_a_weight_and_its_transpose_are_the_same_numbers(
    stack: tuple[int, ...], high: int, wide: int, power_of_two: bool
) -> None:
    weight = torch.randn(*stack, high, wide)
    q, t = reference.blocks(weight, power_of_two=power_of_two)
    assert same(q, quantize_blocks(weight, power_of_two=power_of_two))
    assert t.codes.is_contiguous()
    assert torch.equal(dequantize(t), dequantize(q).transpose(-1, -2))


def test_torchs_is_a_version() -> None:
    assert VERSIONS["torch"] is TorchQuantize
