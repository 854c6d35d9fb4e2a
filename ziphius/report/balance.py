"""balance.jsonl: how many tokens every expert got, and where the routing biases are.

The file of a large network is large, a line has every expert of every layer. So all lines are
found, but only so many of them are read, evenly spaced and always the newest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ziphius.config.errors import BadInput
from ziphius.report.series import Floats, Ints

READ_BYTES = 60_000_000
_STEP = re.compile(rb'\{\s*"step"\s*:\s*(\d+)\s*[,}]')
_BIASES = ("bias_min", "bias_mean", "bias_max")

Loads = NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """One MoE layer: tokens of expert e at logged step r ``loads_RE``, NaN where a line lacks them;
    smallest, mean and largest routing bias ``bias_R3``."""

    index: int
    loads_RE: Loads
    bias_R3: Floats


@dataclass(frozen=True)
class Balance:
    """The logged steps ``R`` that were read, of the ``lines`` that the file has."""

    steps: Ints
    layers: tuple[Layer, ...]
    lines: int


@dataclass(frozen=True)
class _Line:
    step: int
    begin: int
    end: int


def read_balance(path: Path, notes: list[str], read_bytes: int = READ_BYTES) -> Balance | None:
    """Read the file, adding to ``notes`` what was left out; None if it has no line.

    Of a step that occurs twice the last line counts, as for metrics. About ``read_bytes`` bytes
    are parsed. Raises BadInput for a file that cannot be read at all.
    """
    try:
        with path.open("rb") as file:
            lines = _find(file)
            chosen = _choose(lines, read_bytes)
            records = []
            for line in chosen:
                file.seek(line.begin)
                records.append(_parse(file.read(line.end - line.begin)))
    except OSError as error:
        raise BadInput(f"balance {path}: cannot be read: {error.strerror}") from None
    readable = [record for record in records if record is not None]
    if len(readable) < len(records):
        notes.append(f"{path.name}: {len(records) - len(readable)} lines cannot be read.")
    if not readable:
        return None
    if len(chosen) < len(lines):
        notes.append(
            f"{path.name}: {len(chosen):,} of its {len(lines):,} lines were read, evenly spaced; "
            "figures about experts are those of these lines."
        )
    return _arrange(readable, len(lines))


def _find(file: Any) -> list[_Line]:
    """Return the lines that count: a step that is not above the last replaces what follows it."""
    kept: list[_Line] = []
    begin = 0
    for text in file:
        end = begin + len(text)
        match = _STEP.match(text[:100].lstrip())
        # A line without its end was cut off.
        if match and text.endswith(b"}\n"):
            step = int(match[1])
            while kept and kept[-1].step >= step:
                kept.pop()
            kept.append(_Line(step, begin, end))
        begin = end
    return kept


def _choose(lines: list[_Line], read_bytes: int) -> list[_Line]:
    size = sum(line.end - line.begin for line in lines)
    stride = max(1, math.ceil(size / read_bytes))
    # Counted from the end, so that the newest line is among them.
    return lines[::-1][::stride][::-1]


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except ValueError:
        return None
    layers = record.get("layers")
    if not isinstance(layers, dict) or not all(name.isdecimal() for name in layers):
        return None
    return record


def _arrange(records: list[dict[str, Any]], lines: int) -> Balance:
    indices = sorted({int(name) for record in records for name in record["layers"]})
    return Balance(
        steps=np.array([record["step"] for record in records], np.int64),
        layers=tuple(
            _layer(index, [record["layers"].get(str(index)) for record in records])
            for index in indices
        ),
        lines=lines,
    )


def _layer(index: int, entries: list[Any]) -> Layer:
    told = [entry if isinstance(entry, dict) else {} for entry in entries]
    loads = [entry.get("loads") for entry in told]
    experts = max((len(row) for row in loads if isinstance(row, list)), default=0)
    loads_RE = np.full((len(told), experts), np.nan, np.float32)
    for i, row in enumerate(loads):
        if isinstance(row, list) and len(row) == experts:
            with suppress(TypeError, ValueError):
                loads_RE[i] = row
    bias_R3 = np.array([[_number(entry, name) for name in _BIASES] for entry in told], np.float64)
    return Layer(index, loads_RE, bias_R3)


def _number(entry: Mapping[str, Any], name: str) -> float:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)
