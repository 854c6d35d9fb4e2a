"""Safetensors files in pieces: some rows of a tensor are read or written, and no more is held.

The library itself reads whole tensors (of a slice, too) and writes whole files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

_LENGTH_BYTES = 8
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)


class Kind(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, which is a number of a vector."""
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize


class PieceReader:
    """Reads rows of the tensors of one file.

    Raises OSError as a plain read does, and ValueError where there is no header.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # stays open until close()
        try:
            length = int.from_bytes(self._file.read(_LENGTH_BYTES), "little")
            self._base = _LENGTH_BYTES + length
            if self._base > os.fstat(self._file.fileno()).st_size:
                raise ValueError("is no safetensors file")
            header = json.loads(self._file.read(length))
        except BaseException:
            self._file.close()
            raise
        self._starts = {n: t["data_offsets"][0] for n, t in header.items() if n != "__metadata__"}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        """Return the rows from ``start`` up to ``stop``. Raises EOFError where the file ends."""
        data = torch.empty((stop - start) * kind.row_bytes, dtype=torch.uint8)
        left = data.numpy().data
        self._file.seek(self._base + self._starts[name] + start * kind.row_bytes)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise EOFError(f"{name} is cut off")
            left = left[count:]
        return data.view(kind.dtype).view(stop - start, *kind.shape[1:])


class PieceWriter:
    """Writes one file whose tensors are known beforehand, in any order and in pieces of rows.

    Raises OSError as a plain write does; ``close`` raises ValueError when something was not
    written. Leaving the ``with`` block with an error leaves the file incomplete.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, Kind], metadata: Mapping[str, str]
    ) -> None:
        # Readers want numbers at multiples of their size: the widest come first.
        order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        names = {dtype: name for name, dtype in DTYPES.items()}
        self._kinds, self._starts, end = dict(tensors), dict[str, int](), 0
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        for name in order:
            kind, self._starts[name] = tensors[name], end
            end += kind.nbytes
            header[name] = {
                "dtype": names[kind.dtype],
                "shape": list(kind.shape),
                "data_offsets": [self._starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        self._base, self._missing = _LENGTH_BYTES + len(text), end
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  # stays open until close()
        self._write(0, memoryview(len(text).to_bytes(_LENGTH_BYTES, "little") + text))

    def __enter__(self) -> PieceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def put(self, name: str, start: int, rows: Tensor) -> None:
        """Write ``rows`` of the tensor ``name``, the first of which is its row ``start``."""
        kind = self._kinds[name]
        if rows.dtype != kind.dtype or tuple(rows.shape[1:]) != kind.shape[1:]:
            raise ValueError(f"{name}: {rows.dtype} {list(rows.shape)} is no part of {kind}")
        data = rows.detach().cpu().contiguous().flatten().view(torch.uint8)
        self._write(self._base + self._starts[name] + start * kind.row_bytes, data.numpy().data)
        self._missing -= data.numel()

    def close(self) -> None:
        """End the file. Raises ValueError unless as many bytes were written as were announced."""
        self._file.close()
        if self._missing:
            raise ValueError(f"{self._file.name}: {self._missing:,} bytes were never written")

    def _write(self, place: int, data: memoryview) -> None:
        self._file.seek(place)
        while data:
            data = data[self._file.write(data) or 0 :]
