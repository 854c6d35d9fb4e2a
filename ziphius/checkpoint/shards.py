"""The weights of a checkpoint: ``model.safetensors``, or numbered shards and their index."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ziphius.checkpoint.files import is_weight_file
from ziphius.checkpoint.pieces import DTYPES, Kind, PieceReader
from ziphius.config.errors import BadInput, in_one_line

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 2**30
TORCH_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})


class _Entry(NamedTuple):
    file: str
    shape: torch.Size
    dtype: torch.dtype


# Reading


class ShardReader:
    """Names, shapes, dtypes and, one at a time, the tensors of a checkpoint folder.

    Opening reads the headers of all files, which finds missing, truncated and corrupt ones before
    any work is done. Files are opened on first use and stay open until ``close`` or the end of the
    ``with`` block. Nothing is ever unpickled.

    Raises BadInput, naming the file, if there are no safetensors weights, if a file of the index
    is missing or damaged, or if index and files contradict each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._handles: dict[str, Any] = {}
        self._pieces: dict[str, PieceReader] = {}
        self._identity = self._folder_identity()
        self._entries = _read_entries(self.folder)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file. Tensors that were read stay valid."""
        while self._handles:
            self._handles.popitem()[1].__exit__(None, None, None)
        while self._pieces:
            self._pieces.popitem()[1].close()

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._entries)

    def files(self) -> list[str]:
        """Return the names of the weight files, as the manifest spells them."""
        return sorted({entry.file for entry in self._entries.values()})

    def shape(self, name: str) -> torch.Size:
        """Return a tensor's shape, from the header. Raises BadInput for an unknown name."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype, from the header. Raises BadInput for an unknown name."""
        return self._entry(name).dtype

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own, on the CPU.

        Raises BadInput for an unknown name, and if the file or the folder was changed since the
        headers were read.
        """
        file = self._entry(name).file
        path = self.folder / file
        try:
            if file not in self._handles:
                self._handles[file] = _open(path)
                self._require_same_folder()
            tensor: Tensor = self._handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path}: {name} cannot be read: {error}: copy it again") from None
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read the rows from ``start`` up to ``stop`` of one tensor, as ``read`` does all of them.

        Raises OSError where the disk fails.
        """
        entry = self._entry(name)
        path = self.folder / entry.file
        try:
            if entry.file not in self._pieces:
                self._pieces[entry.file] = PieceReader(path)
                self._require_same_folder()
            kind = Kind(entry.dtype, tuple(entry.shape))
            return self._pieces[entry.file].read(name, kind, start, stop)
        except (EOFError, ValueError, KeyError, FileNotFoundError) as error:
            raise BadInput(
                f"{path}: {name} cannot be read: {in_one_line(error)}: copy it again"
            ) from None

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise BadInput(f"{self.folder}: the checkpoint has no tensor {name}")
        return self._entries[name]

    def _folder_identity(self) -> tuple[int, int]:
        try:
            status = os.stat(self.folder)
        except OSError as error:
            raise BadInput(f"{self.folder}: cannot be opened: {error.strerror}") from None
        return status.st_dev, status.st_ino

    def _require_same_folder(self) -> None:
        """Old and new shards have the same names: never mix them when a save came in between."""
        if self._folder_identity() != self._identity:
            raise BadInput(f"{self.folder}: was replaced while it was read: start again")


def _read_entries(folder: Path) -> dict[str, _Entry]:
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if not index.is_file():
        if not single.is_file():
            raise BadInput(_no_weights(folder))
        return _read_header(folder, SINGLE_FILE)
    placed = _read_index(index)
    if single.is_file() and set(placed.values()) != {SINGLE_FILE}:
        raise BadInput(
            f"{folder}: has {SINGLE_FILE} and an {INDEX_FILE} that names other files: delete the"
            " one that is out of date"
        )
    headers = {file: _read_header(folder, file) for file in sorted(set(placed.values()))}
    for name, file in placed.items():
        if name not in headers[file]:
            raise BadInput(
                f"{folder / file}: has no tensor {name}, which {INDEX_FILE} places there: copy"
                " both again"
            )
    return {name: headers[file][name] for name, file in placed.items()}


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return (
            f"{folder}: only pickled weights ({pickled[0]}), which can run code and are never"
            " opened: convert them to safetensors first"
        )
    return f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}: give a folder with weights"


def _read_index(path: Path) -> dict[str, str]:
    try:
        placed = json.loads(path.read_text("utf-8"))["weight_map"]
        usable = bool(placed) and all(_is_plain_name(file) for file in placed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise BadInput(
            f"{path}: is no index: a weight_map from tensor names to files in the same folder is"
            " needed: copy the file again"
        )
    return dict(placed)


def weight_files(folder: Path) -> dict[str, list[str]] | None:
    """Return the file of every tensor; None where a single file holds all of them.

    Raises BadInput for an index that is none.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        return None
    return {name: [file] for name, file in _read_index(index).items()}


def _is_plain_name(file: object) -> bool:
    """An index comes from elsewhere: it may not lead out of its folder."""
    return isinstance(file, str) and file not in ("", ".", "..") and Path(file).name == file


def _read_header(folder: Path, file: str) -> dict[str, _Entry]:
    path = folder / file
    try:
        with _open(path) as opened:
            return {name: _entry(path, name, opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise BadInput(f"{path}: is missing, but {INDEX_FILE} names it: copy it again") from None
    except (SafetensorError, OSError) as error:
        if _is_lfs_pointer(path):
            raise BadInput(
                f"{path}: is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
            ) from None
        raise BadInput(
            f"{path}: cannot be read, it may be truncated: {error}: copy it again"
        ) from None


def _entry(path: Path, name: str, header: Any) -> _Entry:
    dtype = DTYPES.get(header.get_dtype())
    if dtype is None:
        raise BadInput(
            f"{path}: {name} is stored as {header.get_dtype()}: supported are {', '.join(DTYPES)}"
        )
    return _Entry(path.name, torch.Size(header.get_shape()), dtype)


def _open(path: Path) -> Any:
    # Not memory-mapped: a mapped tensor changes, or kills the process, when its file does, and an
    # in-place operation on it would be seen by the next read.
    return safe_open(path, framework="pt", backend="pread")


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(24) == b"version https://git-lfs."
    except OSError:
        return False


# Writing


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, Callable[[], Tensor] | Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] = TORCH_METADATA,
) -> None:
    """Write tensors, in the order given, as one file or as numbered shards with an index.

    ``folder`` is the fresh folder that ``replace_directory`` yields. A tensor may be a function,
    which is called when its turn comes; a shard is written as soon as it is full, so that memory
    holds one shard and the tensor after it. A tensor larger than ``max_shard_bytes`` has a shard of
    its own. Tensors may lie on any device, be views, and share memory.

    Raises OSError as a plain write does (``replace_directory`` turns it into one line), and
    ValueError for a repeated name, no tensors at all, or a folder that has weights already.
    """
    if any(is_weight_file(name) for name in os.listdir(folder)):
        raise ValueError(f"{folder} already holds weights")
    shards: list[list[str]] = []
    placed: set[str] = set()
    pending: dict[str, Tensor] = {}
    total = room = 0
    for name, source in tensors:
        if name in placed:
            raise ValueError(f"two tensors are called {name}")
        tensor = source if isinstance(source, Tensor) else source()
        tensor = tensor.detach().cpu().contiguous()
        if pending and tensor.nbytes > room:
            _write_shard(folder, shards, pending, metadata)
            pending = {}
        room = (room if pending else max_shard_bytes) - tensor.nbytes
        pending[name] = tensor
        placed.add(name)
        total += tensor.nbytes
        del source, tensor
    if not placed:
        raise ValueError("there are no tensors to write")
    _write_shard(folder, shards, pending, metadata)
    _name_shards(folder, shards, total)


def _write_shard(
    folder: Path, shards: list[list[str]], tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> None:
    shards.append(list(tensors))
    write_file(_unnamed(folder, len(shards)), tensors, metadata)


def write_file(
    path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] = TORCH_METADATA
) -> None:
    """Write one safetensors file that is not there yet. Raises OSError as a plain write does."""
    path.touch(exist_ok=False)
    mode = path.stat().st_mode
    try:
        save_file(_unshared(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        raise _as_os_error(
            error, path, sum(tensor.nbytes for tensor in tensors.values())
        ) from error
    # safetensors makes files that only their owner can read; the user's umask should decide.
    path.chmod(mode)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors whose memory belongs to another one too: the format does not share."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result


def _as_os_error(error: SafetensorError, path: Path, size: int) -> Exception:
    """Find the system's error number in the text, which is where safetensors puts it."""
    code = re.search(r"\(os error (\d+)\)", str(error))
    if code is None:
        return error
    reason = f"{os.strerror(int(code[1]))} for a shard of {size:,} bytes"
    return OSError(int(code[1]), reason, str(path))


def _unnamed(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.partial"


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give the shards their names, which contain how many there are, and write the index."""
    placed = {}
    for number, (names, file) in enumerate(
        zip(shards, shard_files(len(shards)), strict=True), start=1
    ):
        _unnamed(folder, number).rename(folder / file)
        placed.update(dict.fromkeys(names, file))
    write_index(folder, placed, total)


def shard_files(count: int) -> list[str]:
    """Return the names of so many weight files: one has no number."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def write_index(folder: Path, placed: Mapping[str, str], total: int) -> None:
    """Write which file every tensor is in, and the bytes of all; a single file needs no index."""
    if set(placed.values()) == {SINGLE_FILE}:
        return
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
