"""E5M6 in Triton: the bits of the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.triton.support import DEVICE, ON_GPU
from ziphius.kernels.e5m6 import E5M6, TorchE5M6
from ziphius.kernels.triton.e5m6 import CANDIDATES, Launch, TritonE5M6


def numbers(rows: int, width: int, seed: int, device: torch.device) -> torch.Tensor:
    """Numbers of many sizes, ties among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x *= torch.randint(-40, 20, (rows, width), generator=generator).float().exp2()
    return x.bfloat16().to(device, torch.bfloat16 if ON_GPU else torch.float32)


@settings(max_examples=200 if ON_GPU else 15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 400), st.integers(0, 1000))
def test_bits_are_those_of_the_reference(rows: int, width: int, seed: int) -> None:
    device = torch.device("cuda" if ON_GPU else "cpu")
    x = numbers(rows, width, seed, device)
    ours, reference = TritonE5M6().encode(x), TorchE5M6().encode(x.cpu())
    assert torch.equal(ours.packed.cpu(), reference.packed)
    assert torch.equal(ours.scales.cpu(), reference.scales)
    for dtype in (torch.float32, x.dtype):
        back = TritonE5M6().decode(ours, width, dtype)
        assert torch.equal(back.cpu(), TorchE5M6().decode(reference, width, dtype))


@settings(max_examples=200 if ON_GPU else 15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from(CANDIDATES), st.integers(0, 1000))
def test_whole_tiles_of_bf16(rows: int, tiles: int, launch: Launch, seed: int) -> None:
    """Their pairs of numbers are words, which the interpreter computes as a GPU does."""
    x = numbers(rows, 128 * tiles, seed, DEVICE).bfloat16()
    x[0, ::7] = -0.0
    ours, reference = TritonE5M6(launch).encode(x), TorchE5M6().encode(x.cpu())
    assert torch.equal(ours.packed.cpu(), reference.packed)
    assert torch.equal(ours.scales.cpu(), reference.scales)
    back = TritonE5M6(launch).decode(ours, 128 * tiles, torch.bfloat16)
    expected = TorchE5M6().decode(reference, 128 * tiles, torch.bfloat16)
    assert torch.equal(back.cpu().view(torch.int16), expected.view(torch.int16))


def test_every_number_of_bf16_beside_the_largest() -> None:
    """In every exponent that E5M6 has, and below; all fractions, both signs, ties among them."""
    bits = torch.arange(0x8000 - 0x80, dtype=torch.int32)
    bits = torch.cat([bits, bits | 0x8000]).to(torch.int16).view(torch.bfloat16)
    for top in (65024.0, 32768.0, 2.0**40, 1e-4):
        within = bits[bits.abs() <= top]
        x = torch.nn.functional.pad(within, (0, -len(within) % 127)).view(-1, 127)
        x = torch.nn.functional.pad(x, (0, 1), value=top).to(DEVICE)
        ours, reference = TritonE5M6().encode(x), TorchE5M6().encode(x.cpu())
        assert torch.equal(ours.packed.cpu(), reference.packed)
        assert torch.equal(ours.scales.cpu(), reference.scales)


def test_all_codes_come_back_in_bf16() -> None:
    codes = torch.arange(4096)
    words = codes[::2] | codes[1::2] << 12
    packed = torch.stack([(words >> shift) & 255 for shift in (0, 8, 16)], -1).flatten()
    scales = torch.tensor([[120], [127], [98]], dtype=torch.uint8).expand(3, 32)
    q = E5M6(packed.to(torch.uint8).expand(3, -1), scales)
    expected = TorchE5M6().decode(q, 4096, torch.bfloat16)
    for launch in CANDIDATES:
        ours = TritonE5M6(launch).decode(E5M6(*(t.to(DEVICE) for t in q)), 4096, torch.bfloat16)
        torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_all_codes_come_back(device: torch.device) -> None:
    codes = torch.arange(4096)
    words = codes[::2] | codes[1::2] << 12
    packed = torch.stack([(words >> shift) & 255 for shift in (0, 8, 16)], -1).flatten()
    q = E5M6(packed.to(torch.uint8).unsqueeze(0), torch.full((1, 32), 120, dtype=torch.uint8))
    there = E5M6(*(t.to(device) for t in q))
    ours, reference = TritonE5M6().decode(there, 4096), TorchE5M6().decode(q, 4096)
    torch.testing.assert_close(ours.cpu(), reference, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("width", [256, 255])
def test_a_tile_that_is_not_finite_is_nan(bad: float, width: int, device: torch.device) -> None:
    x = numbers(2, width, 0, device)
    x[1, 3] = bad
    for y in (x, x.bfloat16()):
        back = TritonE5M6().decode(TritonE5M6().encode(y), width)
        assert back[1, :128].isnan().all()
        assert back[0].isfinite().all()
        assert back[1, 128:].isfinite().all()


def test_heads_side_by_side_need_no_copy(device: torch.device, storage: torch.dtype) -> None:
    wide = torch.randn(2, 6, 384, device=device, dtype=storage)
    part = wide[..., :256]
    ours = TritonE5M6().encode(part)
    assert torch.equal(ours.packed.cpu(), TorchE5M6().encode(part.cpu()).packed)
