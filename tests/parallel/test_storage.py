"""Pieces on disk: whatever was cut how, any other piece is read from it."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.parallel.rectangles import Rectangle, rectangles
from ziphius.parallel.storage import read_index, read_rectangles, write_rectangles

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def tensors(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(rows * 10 + columns)
    shapes = {
        "first.a.weight": (rows, columns),
        "second.a.weight": (columns, rows),
        "v": (columns,),
    }
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def slices(whole: dict[str, Tensor], ends: list[float]) -> list[list[Rectangle]]:
    """Give every writer its part of each tensor, flat, as shards are."""
    found: list[list[Rectangle]] = [[] for _ in range(len(ends) + 1)]
    for name, tensor in whole.items():
        cuts = [0, *sorted(int(end * tensor.numel()) for end in ends), tensor.numel()]
        for writer, (start, stop) in enumerate(pairwise(cuts)):
            flat = tensor.flatten()[start:stop]
            found[writer] += rectangles(name, tensor.shape, None, start, flat)
    return found


def stored(
    folder: Path, whole: dict[str, Tensor], ends: list[float], size: int
) -> dict[str, set[str]]:
    index: dict[str, set[str]] = {}
    for writer, pieces in enumerate(slices(whole, ends)):
        for file, names in write_rectangles(folder, pieces, writer, size).items():
            assert (folder / file).is_file()
            for name in names:
                index.setdefault(name, set()).add(file)
    return index


@given(
    *(st.integers(1, 7), st.integers(1, 7), st.sampled_from(DTYPES)),
    *(st.lists(st.floats(0, 1), max_size=3), st.lists(st.floats(0, 1), max_size=3)),
    *(st.sampled_from([1, 60, 10**6]), st.booleans()),
)
@given_settings(max_examples=60)
def test_any_cut_is_read_from_any_other(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    written: list[float],
    wanted: list[float],
    size: int,
    indexed: bool,
) -> None:
    whole = tensors(rows, columns, dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = stored(folder, whole, written, size)
        assert not (folder / ".metadata").exists()
        for pieces in slices(whole, wanted):
            targets = [piece._replace(data=torch.full_like(piece.data, 7)) for piece in pieces]
            read_rectangles(folder, targets, index if indexed else None)
            for piece, target in zip(pieces, targets, strict=True):
                assert torch.equal(piece.data, target.data)


def test_what_is_missing_or_of_another_shape_is_told_before_anything_is_read(
    tmp_path: Path,
) -> None:
    whole = tensors(4, 6, torch.float32)
    index = stored(tmp_path, whole, [0.4], 10**6)
    there = Rectangle("v", (0,), (6,), torch.zeros(6))
    for absent in (
        Rectangle("first.b.weight", (0, 0), (4, 6), torch.zeros(4, 6)),
        Rectangle("first.a.weight", (0, 0), (5, 6), torch.zeros(5, 6)),
        Rectangle("first.a.weight", (0, 0), (3, 6), torch.zeros(3, 6)),
        Rectangle("first.a.weight", (0, 0, 0), (4, 6, 1), torch.zeros(4, 6, 1)),
    ):
        with pytest.raises(BadInput, match=rf"{absent.name} is not there, whole and of shape"):
            read_rectangles(tmp_path, [there, absent], index)
    assert not there.data.any()


@pytest.mark.parametrize("damage", ["lost", "cut off", "no header"])
def test_a_damaged_file_is_told_in_one_line(damage: str, tmp_path: Path) -> None:
    index = stored(tmp_path, tensors(4, 6, torch.float32), [], 10**6)
    file = tmp_path / next(iter(index["v"]))
    content = file.read_bytes()
    if damage == "lost":
        file.unlink()
    else:
        file.write_bytes(content[:-8] if damage == "cut off" else b"\xff" * 200)
    with pytest.raises(BadInput) as refused:
        read_rectangles(tmp_path, [Rectangle("v", (0,), (6,), torch.zeros(6))], index)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_two_pieces_at_one_place_are_refused(tmp_path: Path) -> None:
    piece = Rectangle("v", (0,), (6,), torch.zeros(3))
    with pytest.raises(ValueError, match="two pieces are called v@0"):
        write_rectangles(tmp_path, [piece, piece], 0)


@pytest.mark.parametrize("text", ["", "[1]", '{"v": ["../x"]}', '{"v": 3}'])
def test_an_index_that_is_none_or_leads_elsewhere_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(BadInput, match=r"index\.json"):
        read_index(tmp_path / "index.json")
