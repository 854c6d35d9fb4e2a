"""Pieces of tensors on disk: each process writes what it holds, and reads what it needs.

A piece is a rectangle of a tensor that has a name of its own in the whole model, so that whoever
reads need not be laid out as whoever wrote. The files are safetensors, through the storage of
torch's distributed checkpoints; its own metadata, a pickle, is never written: where a piece
begins is in its file's header, and which files have pieces of a tensor in ``index.json``.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from ziphius.config.errors import BadInput, in_one_line
from ziphius.parallel.rectangles import Rectangle

# The library holds a file's numbers twice while it writes it.
FILE_BYTES = 128 * 2**20
INDEX = "index.json"
_AT = "@"
_LENGTH_BYTES = 8
_NOTES = "__metadata__"


# Writing


def write_rectangles(
    folder: Path, pieces: Sequence[Rectangle], writer: int, file_bytes: int = FILE_BYTES
) -> dict[str, list[str]]:
    """Write pieces into files that bear the number of this writer; return each one's names.

    Memory is two files, or the largest piece twice. Raises OSError as a plain write does.
    """
    if not pieces:
        return {}
    storage = HuggingFaceStorageWriter(
        str(folder), _files(pieces, file_bytes), save_distributed=True
    )
    storage.fs = _Repeatable()
    # All is on the processor already: where there is a GPU the library would copy ahead.
    storage.per_thread_copy_ahead = 0
    planner = _Saving(pieces)
    (plan,) = storage.prepare_global_plan([planner.create_local_plan()])
    # Where nothing is agreed with others, the library takes every process for the first.
    plan = replace(plan, storage_data={**plan.storage_data, "shard_index": writer + 1})
    written: dict[str, list[str]] = {}
    for result in storage.write_data(plan, planner).wait():
        names = written.setdefault(result.storage_data.relative_path, [])
        names.append(result.index.fqn.partition(_AT)[0])
    return written


def _key(piece: Rectangle) -> str:
    """Return what a piece is called in a file: no two pieces of a tensor begin at one place."""
    if tuple(piece.data.shape) == piece.whole:
        return piece.name
    return piece.name + _AT + ",".join(map(str, piece.offsets))


def _files(pieces: Sequence[Rectangle], file_bytes: int) -> dict[str, int]:
    """Say which file each piece is in, counted from 1."""
    found, number, held = dict[str, int](), 1, 0
    for piece in pieces:
        if _key(piece) in found:
            raise ValueError(f"two pieces are called {_key(piece)}")
        if held and held + piece.data.nbytes > file_bytes:
            number, held = number + 1, 0
        found[_key(piece)] = number
        held += piece.data.nbytes
    return found


class _Repeatable(FileSystem):
    """Files of equal tensors have equal bytes."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with _OneOrder(path, mode) as stream:
            yield stream


class _OneOrder(io.FileIO):
    """Takes a whole safetensors file, whose notes come in any order, and sorts these."""

    def write(self, data: Any) -> int:
        view = memoryview(data)
        end = _LENGTH_BYTES + int.from_bytes(view[:_LENGTH_BYTES], "little")
        header = json.loads(bytes(view[_LENGTH_BYTES:end]))
        header[_NOTES] = dict(sorted(header[_NOTES].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        for part in (len(text).to_bytes(_LENGTH_BYTES, "little"), text, view[end:]):
            left = memoryview(part)
            while left:
                left = left[super().write(left) :]
        return len(view)


class _Saving(SavePlanner):
    """Gives the storage one process's pieces."""

    def __init__(self, pieces: Sequence[Rectangle]) -> None:
        self.pieces = {_key(piece): piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_item(piece) for piece in self.pieces.values()])

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.pieces[write_item.index.fqn].data

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: it was made for its pieces."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError("every process plans for itself")

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan


def _item(piece: Rectangle) -> WriteItem:
    offsets, properties = torch.Size(piece.offsets), TensorProperties(dtype=piece.data.dtype)
    chunk = ChunkStorageMetadata(offsets=offsets, sizes=piece.data.shape)
    return WriteItem(
        index=MetadataIndex(_key(piece), offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, properties, torch.Size(piece.whole)),
    )


# Reading


@torch.no_grad()
def read_rectangles(
    folder: Path, wanted: Iterable[Rectangle], index: Mapping[str, Iterable[str]] | None = None
) -> None:
    """Fill the ``data`` of every rectangle from a folder's safetensors files, piece by piece.

    ``index`` says which files have pieces of a tensor; without it all of the folder are looked at.
    Whole tensors are pieces too. Numbers are converted to the dtype of ``data``. Raises BadInput,
    before anything is filled, where a piece is missing or a tensor has another shape.
    """
    targets = list(wanted)
    reader = HuggingFaceStorageReader(str(folder))
    if index is not None:
        reader.fs = _Listed({f for piece in targets for f in index.get(piece.name, ())})
    try:
        metadata = reader.read_metadata()
        planner = _Loading(folder, targets, metadata)
        reader.set_up_storage_reader(metadata, True)
        reader.read_data(planner.create_local_plan(), planner).wait()
    except (OSError, SafetensorError, ValueError, KeyError, AssertionError) as error:
        raise BadInput(f"{folder}: cannot be read: {in_one_line(error)}") from None


class _Listed(FileSystem):
    """A folder of which only some files count."""

    def __init__(self, files: set[str]) -> None:
        super().__init__()
        self.files = files

    def ls(self, path: Any) -> list[str]:
        return [str(Path(path) / file) for file in sorted(self.files)]


class _Loading(LoadPlanner):
    """Finds where the storage has what a process wants, and gives it the memory to fill."""

    def __init__(self, folder: Path, wanted: list[Rectangle], metadata: Metadata) -> None:
        self.wanted = wanted
        stored: dict[str, list[tuple[MetadataIndex, ChunkStorageMetadata]]] = {}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), "files hold tensors"
            pieces = stored.setdefault(key.partition(_AT)[0], [])
            pieces += [(MetadataIndex(key, c.offsets), c) for c in tensor.chunks]
        self.items: list[ReadItem] = []
        for number, piece in enumerate(wanted):
            sources = stored.get(piece.name, ())
            found = [item for source in sources if (item := _read(number, piece, source))]
            if sum(prod(item.lengths) for item in found) != piece.data.numel():
                raise BadInput(
                    f"{folder}: {piece.name} is not there, whole and of shape {list(piece.whole)}: "
                    "it was written by another recipe, or files are missing"
                )
            self.items += found

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self.items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        piece = self.wanted[int(read_item.dest_index.fqn)]
        offsets = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return piece.data[tuple(slice(start, start + length) for start, length in offsets)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the memory that was filled is what was wanted."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError("there are only tensors")

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: it was made for what is wanted."""

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan


def _read(
    number: int, piece: Rectangle, source: tuple[MetadataIndex, ChunkStorageMetadata]
) -> ReadItem | None:
    """Say what to read of a stored piece; None where they have nothing in common."""
    index, chunk = source
    stored_end = [a + n for a, n in zip(chunk.offsets, chunk.sizes, strict=True)]
    if len(stored_end) != len(piece.whole):
        return None
    if any(end > size for end, size in zip(stored_end, piece.whole, strict=True)):
        return None
    end = [a + n for a, n in zip(piece.offsets, piece.data.shape, strict=True)]
    begin = [max(a, b) for a, b in zip(piece.offsets, chunk.offsets, strict=True)]
    lengths = [min(a, b) - c for a, b, c in zip(end, stored_end, begin, strict=True)]
    if any(length <= 0 for length in lengths):
        return None
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(str(number)),
        dest_offsets=_relative(begin, piece.offsets),
        storage_index=index,
        storage_offsets=_relative(begin, chunk.offsets),
        lengths=torch.Size(lengths),
    )


def _relative(begin: Sequence[int], to: Sequence[int]) -> torch.Size:
    return torch.Size([a - b for a, b in zip(begin, to, strict=True)])


def read_index(file: Path) -> dict[str, list[str]]:
    """Read which files have pieces of each tensor. Raises BadInput for what is no such index."""
    try:
        index = json.loads(file.read_text("utf-8"))
        usable = all(Path(f).name == f for files in index.values() for f in files)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{file}: cannot be read: {in_one_line(error)}") from None
    if not usable:
        raise BadInput(f"{file}: leads out of its folder")
    return dict(index)
