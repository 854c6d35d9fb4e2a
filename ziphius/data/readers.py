"""Readers: a piece of a source in, its texts out, one after the other, in bounded memory."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal

from ziphius.config.errors import BadInput

Kind = Literal["text", "jsonl", "parquet", "hub"]

# The number of a record in its piece, its text if it is one, and how many bytes reading it took.
Record = tuple[int, str | None, int]

_ROWS_AT_ONCE = 256
_CHUNK_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Piece:
    """What one reader reads from end to end: a file, or a split of a data set of the hub.

    ``path`` is where it is, ``name`` what its documents' names begin with. ``bytes`` is its size,
    0 where unknown. ``is_alone``: it was named itself, so it must be readable as what it is.
    """

    source: int
    kind: Kind
    path: str
    name: str
    text_field: str
    bytes: int
    is_alone: bool


@dataclass(frozen=True, slots=True)
class Raw:
    """A text as its source holds it. ``cost`` is how many bytes of the piece reading it took.

    A file that is not UTF-8 has no text and is not ``is_decoded``.
    """

    source: int
    name: str
    is_record: bool
    cost: int
    text: str
    is_decoded: bool = True


def read_piece(piece: Piece) -> Iterator[Raw]:
    """Yield the texts of a piece. Names of records end with ``#`` and their number, from 1.

    Raises BadInput, which names the file and the line or row, for what cannot be read.
    """
    if piece.kind == "text":
        yield _read_text(piece)
        return
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "hub": _read_hub}
    for number, text, cost in readers[piece.kind](piece):
        name = f"{piece.name}#{number}"
        yield Raw(piece.source, name, True, cost, text or "", is_decoded=text is not None)


def optional(module: str, extra: str, what: str) -> ModuleType:
    """Import an optional library. Raises BadInput with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise BadInput(
            f'{what}: needs {package}, which is not installed: pip install "ziphius[{extra}]"'
        ) from None


def _read_text(piece: Piece) -> Raw:
    with _told(piece.path):
        data = Path(piece.path).read_bytes()
    try:
        # No line break is translated here: the text is the bytes of the file.
        return Raw(piece.source, piece.name, False, len(data), data.decode())
    except UnicodeDecodeError as error:
        if piece.is_alone:
            raise BadInput(
                f"{piece.path}: is not UTF-8 text (byte {error.start}): give a text, "
                "JSON lines (.jsonl, .gz, .zst) or Parquet file, or a folder"
            ) from None
        return Raw(piece.source, piece.name, False, len(data), "", is_decoded=False)


# JSON lines


def _read_jsonl(piece: Piece) -> Iterator[Record]:
    for number, line, cost in _lines(piece.path):
        text = _text_of_line(line, f"{piece.path}: line {number}", piece.text_field)
        yield number, text, cost


def _lines(path: str) -> Iterator[tuple[int, bytes, int]]:
    """Yield lines that are not empty, numbered, with the bytes on the disk that each took."""
    with _told(path), open(path, "rb") as raw:
        read = 0
        for number, line in enumerate(_decompressed(raw, path), start=1):
            if line.strip():
                position = raw.tell()
                yield number, line, position - read
                read = position


def _decompressed(raw: BinaryIO, path: str) -> Iterator[bytes]:
    if path.endswith(".gz"):
        yield from gzip.GzipFile(fileobj=raw)
    elif path.endswith(".zst"):
        yield from io.BufferedReader(_Zstandard(raw, path))
    else:
        yield from raw


class _Zstandard(io.RawIOBase):
    """A stream of .zst frames. Unlike the library's own it tells when the last one is cut short."""

    def __init__(self, raw: BinaryIO, path: str) -> None:
        self._raw = raw
        self._library = optional("zstandard", "data", path)
        self._frame: Any = None
        self._compressed = self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = self._compressed or self._raw.read(_CHUNK_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._pending = self._frame.decompress(data)
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from None
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._pending))
        buffer[:count], self._pending = self._pending[:count], self._pending[count:]
        return count


def _text_of_line(line: bytes, where: str, field: str) -> str:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        raise BadInput(f"{where}: is not UTF-8: repair or remove the line") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(": line 1 ")[0]
        raise BadInput(f"{where}: is not valid JSON: {reason}: repair or remove it") from None
    if not isinstance(record, dict):
        raise BadInput(f'{where}: is no JSON object: write {{"{field}": "..."}}')
    return _field(record, field, where)


def _field(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise BadInput(f"{where}: {_no_field(field, list(record))}")
    if not isinstance(value := record[field], str):
        raise BadInput(f"{where}: field '{field}' is {_json_type(value)}, not a string")
    return value


def _no_field(field: str, names: list[str]) -> str:
    known = ", ".join(f"'{name}'" for name in sorted(names)) or "none"
    return f"has no field '{field}': set text_field to the text's; its fields: {known}"


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")


# Parquet


def _read_parquet(piece: Piece) -> Iterator[Record]:
    parquet = optional("pyarrow.parquet", "data", piece.path)
    pyarrow = optional("pyarrow", "data", piece.path)
    with _told(piece.path, (pyarrow.ArrowException,)), parquet.ParquetFile(piece.path) as file:
        _require_text_column(file.schema_arrow, piece, pyarrow.types)
        rows, number, done = file.metadata.num_rows, 0, 0
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[piece.text_field]):
            for value in _values_as_bytes(batch.column(0), pyarrow):
                number += 1
                if value is None:
                    raise BadInput(
                        f"{piece.path}: row {number}: field '{piece.text_field}' is null, "
                        "not a string"
                    )
                cost = piece.bytes * number // rows - done
                done += cost
                yield number, _decoded(value), cost


def _values_as_bytes(column: Any, pyarrow: ModuleType) -> list[bytes | None]:
    """Return strings undecoded: a file may hold some that are no UTF-8."""
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values


def _require_text_column(schema: Any, piece: Piece, types: ModuleType) -> None:
    if piece.text_field not in schema.names:
        raise BadInput(f"{piece.path}: {_no_field(piece.text_field, schema.names)}")
    kind = schema.field(piece.text_field).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
        raise BadInput(f"{piece.path}: field '{piece.text_field}' is {kind}, not a string")


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


# The Hugging Face hub


def _read_hub(piece: Piece) -> Iterator[Record]:
    datasets = optional("datasets", "data", f"hf:{piece.path}")
    dataset, config, split = split_hub_path(piece.path)
    where = f"hf:{dataset}: {split}"
    try:
        rows = datasets.load_dataset(dataset, config, split=split, streaming=True)
        for number, record in enumerate(rows, start=1):
            yield number, _field(record, piece.text_field, f"{where}: row {number}"), 0
    except BadInput:
        raise
    except Exception as error:  # the library raises nothing more precise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInput(
            f"{where}: cannot be read: {reason}: check the name and the network, or give a file"
        ) from error


def split_hub_path(path: str) -> tuple[str, str | None, str]:
    """Divide ``OWNER/NAME:CONFIG@SPLIT``; the configuration may lack, the split is ``train``."""
    rest, _, split = path.partition("@")
    name, _, config = rest.partition(":")
    return name, config or None, split or "train"


@contextmanager
def _told(path: str, more: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Say in one line that a file cannot be read or is damaged."""
    damaged: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile, *more)
    try:
        yield
    except damaged as error:
        raise BadInput(
            f"{path}: is damaged: {_first_line(error)}: copy or download it again"
        ) from None
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise BadInput(f"{path}: cannot be read: {reason}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
