"""Safetensors files in pieces, against the library's own reader and writer."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ziphius.checkpoint.files import replace_directory
from ziphius.checkpoint.pieces import DTYPES, Kind, PieceReader, PieceWriter
from ziphius.checkpoint.shards import ShardReader, write_shards
from ziphius.config.errors import BadInput


def example(rows: int = 7, columns: int = 5) -> dict[str, Tensor]:
    """One tensor of every dtype, of odd sizes, and vectors."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 50
    tensors = {name: drawn.to(dtype) for name, dtype in DTYPES.items()}
    return tensors | {"vector": drawn[0].clone(), "bytes": drawn[0, :3].to(torch.uint8)}


def kind(tensor: Tensor) -> Kind:
    return Kind(tensor.dtype, tuple(tensor.shape))


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 6), cut=st.integers(1, 9))
def test_what_is_written_in_pieces_is_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "model.safetensors"
    tensors = example(rows, columns)
    with PieceWriter(path, {n: kind(t) for n, t in tensors.items()}, {"format": "pt"}) as writer:
        pieces = [
            (name, start, part)
            for name, tensor in tensors.items()
            for start, part in zip(range(0, len(tensor), cut), tensor.split(cut), strict=True)
        ]
        for name, start, part in reversed(pieces):
            writer.put(name, start, part)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor), name
    # Readers of memory want every number at a multiple of its size, from the file's beginning.
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        start = 8 + length + entry["data_offsets"][0]
        assert start % tensors[name].dtype.itemsize == 0


def test_rows_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    tensors = example(11, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    with ShardReader(tmp_path) as reader:
        for name, tensor in tensors.items():
            for start in range(len(tensor)):
                for stop in range(start + 1, len(tensor) + 1):
                    rows = reader.read_rows(name, start, stop)
                    assert rows.dtype == tensor.dtype
                    assert bits(rows) == bits(tensor[start:stop])
        rows.zero_()  # memory of its own
        assert bits(reader.read_rows(name, 0, len(tensor))) == bits(tensor)


def test_a_file_that_misses_something_is_an_error(tmp_path: Path) -> None:
    tensor = torch.ones(4, 3)
    with (
        pytest.raises(ValueError, match="12 bytes were never written"),
        PieceWriter(tmp_path / "file", {"a": kind(tensor)}, {}) as writer,
    ):
        writer.put("a", 0, tensor[:3])
    with (
        pytest.raises(ValueError, match="is no part of"),
        PieceWriter(tmp_path / "file", {"a": kind(tensor)}, {}) as writer,
    ):
        writer.put("a", 0, tensor[:, :2])
    # What stopped the work comes through, not the bytes that are missing because of it.
    with (
        pytest.raises(KeyboardInterrupt),
        PieceWriter(tmp_path / "file", {"a": kind(tensor)}, {}) as writer,
    ):
        raise KeyboardInterrupt


def test_rows_of_files_that_changed_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / ".", [("a", torch.ones(100, 3)), ("b", torch.ones(3))])
    path = tmp_path / "model.safetensors"
    with ShardReader(tmp_path) as reader:
        with pytest.raises(BadInput, match="has no tensor c"):
            reader.read_rows("c", 0, 1)
        path.write_bytes(path.read_bytes()[:-600])
        with pytest.raises(BadInput, match="is cut off: copy it again"):
            reader.read_rows("a", 0, 100)
    folder = tmp_path / "folder"
    with replace_directory(folder) as new:
        write_shards(new, [("a", torch.ones(2))])
        (new / "config.json").write_text("{}")
    with ShardReader(folder) as reader:
        with replace_directory(folder) as new:
            write_shards(new, [("a", torch.zeros(2))])
        with pytest.raises(BadInput, match="was replaced while it was read"):
            reader.read_rows("a", 0, 1)


def test_a_file_that_is_no_safetensors_file_raises(tmp_path: Path) -> None:
    for length, said in ((5, "Expecting value"), (6, "is no safetensors file"), (2**60, "is no")):
        (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + b"hello")
        with pytest.raises(ValueError, match=said):
            PieceReader(tmp_path / "file")
