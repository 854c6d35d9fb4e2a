"""Correct first: a version's result beside the reference's, on fresh inputs and poisoned memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from support.gpu.entry import Entry, Place, Version

# Named by what they are on the class or the module, since a call may come either way.
_UNWRITTEN = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        Tensor.new_empty,
        Tensor.new_empty_strided,
    }
)


class Wrong(Exception):
    """A version's result is not what the reference says."""


class Poison(TorchFunctionMode):
    """Fills memory that is taken without being written with all bits set.

    That is NaN in every float format with a NaN of that code, E4M3 included, and -1 in integers: a
    kernel that leaves something unwritten is seen.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _UNWRITTEN and result.numel() and result.device.type != "meta":
            fill = result if result.is_contiguous() else result.as_strided(*_whole(result))
            fill.view(-1).view(torch.uint8).fill_(255)
        return result


def _whole(x: Tensor) -> tuple[tuple[int], tuple[int]]:
    """Return size and stride of all memory below a tensor, as one row."""
    return (x.untyped_storage().nbytes() // x.element_size(),), (1,)


def relative_error(out: Tensor, wanted: Tensor) -> float:
    """Return ``|out - wanted| / |wanted|`` in float64. Raises Wrong where shapes differ."""
    if out.shape != wanted.shape:
        raise Wrong(f"has the shape {tuple(out.shape)}, not {tuple(wanted.shape)}")
    total = torch.zeros(2, dtype=torch.float64, device=wanted.device)
    rows = zip(_rows(out), _rows(wanted), strict=True)
    for out_part, wanted_part in rows:
        wide = wanted_part.double()
        total[0] += (out_part.double() - wide).square().sum()
        total[1] += wide.square().sum()
    off, size = total.sqrt().tolist()
    return off / size if size else (0.0 if off == 0 else off)


def _rows(x: Tensor) -> Sequence[Tensor]:
    """Cut a tensor so that a part of it in float64 is small beside it."""
    return x.reshape(-1).split(2**26) if x.numel() else ()


def wanted_of(entry: Entry, place: Place, seed: int) -> Sequence[Tensor]:
    """Compute what the reference wants of the inputs of a seed."""
    wanted = entry.reference(entry.make(place.generator(seed)))
    return (wanted,) if isinstance(wanted, Tensor) else tuple(wanted)


def check(
    entry: Entry, version: Version, place: Place, seed: int, wanted: Sequence[Tensor]
) -> float:
    """Return a version's largest relative error. Raises Wrong when it is out of bounds."""
    inputs = entry.make(place.generator(seed))
    prepared = version.prepare(inputs)
    # What torch.compile makes takes its memory elsewhere.
    with nullcontext() if version.slow else Poison():
        result = version.run(prepared)
    found = entry.answer(inputs, result)
    if len(found) != len(wanted):
        raise Wrong(f"{len(found)} results, not {len(wanted)}")
    bound = entry.bound if version.bound is None else version.bound
    errors = [relative_error(out, one) for out, one in zip(found, wanted, strict=True)]
    for number, error in enumerate(errors):
        if not error <= bound:
            raise Wrong(f"result {number} is {error:.2g} off, relative; {bound:g} is allowed")
    return max(errors, default=0.0)
