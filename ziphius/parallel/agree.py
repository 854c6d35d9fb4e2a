"""What ranks tell each other that is no tensor: values of JSON, over an axis of processors."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ziphius.parallel.collectives import Axis


def gather_json(axis: Axis, value: Any) -> list[Any]:
    """Return the value of every rank of the axis, in order. Raises Lost."""
    own = _bytes(value)
    sizes = axis.all_gather(torch.tensor([len(own)])).tolist()
    padded = own.new_zeros(max(sizes))
    padded[: len(own)] = own
    joined = axis.all_gather(padded).view(axis.size, -1)
    return [_value(row[:size]) for row, size in zip(joined, sizes, strict=True)]


def share_json(axis: Axis, value: Any, source: int = 0) -> Any:
    """Return the value of the rank at place ``source``; the others' are ignored. Raises Lost."""
    own = _bytes(value)
    size = int(axis.broadcast(torch.tensor([len(own)]), source))
    return _value(axis.broadcast(own if axis.place == source else own.new_zeros(size), source))


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
