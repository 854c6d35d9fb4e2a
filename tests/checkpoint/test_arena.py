"""Weights side by side in large pieces of memory."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ziphius.checkpoint.arena import ALIGNED, Arena, block_bytes

SHAPES = st.lists(st.sampled_from([(0,), (1,), (3, 5), (64, 64), (700,)]), max_size=20)
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.uint8])


@given(shapes=SHAPES, dtype=DTYPES)
def test_what_is_placed_is_kept_apart_and_aligned(
    shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    arena = Arena(block=4096)
    given = [torch.randint(0, 100, shape).to(dtype) for shape in shapes]
    placed = [arena.place(x.T if x.ndim > 1 else x) for x in given]
    for x, y in zip(given, placed, strict=True):
        assert torch.equal(y, x.T if x.ndim > 1 else x)
        assert y.is_contiguous()
        assert not y.numel() or y.data_ptr() % ALIGNED == 0


@given(shapes=SHAPES, dtype=DTYPES)
def test_blocks_are_known_before(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    arena = Arena(block=4096)
    placed = [arena.place(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    assert block_bytes([x.nbytes for x in placed], 4096) == arena.bytes
