"""Who answers for which weight: of everything that ranks hold alike, one of them.

A weight that tensor parallelism cuts is in pieces, each with an owner, and one rank that puts them
together for a checkpoint. Owners are spread so that ranks have about as many numbers each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ziphius.config.errors import ZiphiusError
from ziphius.parallel.agree import gather_json
from ziphius.parallel.collectives import Axis
from ziphius.parallel.rectangles import Numbers, SplitOf, unsplit

Named = Iterable[tuple[str, Tensor]]


class Piece(NamedTuple):
    """What the places ``holders`` have of a weight: ``size`` of the dimension that is cut."""

    start: int
    size: int
    holders: tuple[int, ...]
    owner: int


@dataclass(frozen=True)
class Entry:
    """A weight of the whole model. ``pieces`` ascend along ``dim``; one holds all of an uncut one.

    ``writer`` is the owner of a piece that writes the whole weight.
    """

    name: str
    whole: Numbers
    dim: int
    pieces: tuple[Piece, ...]
    writer: int


class Owners:
    """The weights of a model that is spread over an axis, in one order on all ranks."""

    def __init__(self, entries: Iterable[Entry], place: int, split_of: SplitOf) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self.place, self.split_of = place, split_of

    @classmethod
    def agree(cls, weights: Named, axis: Axis, split_of: SplitOf = unsplit) -> Owners:
        """Tell each other who holds what, and agree on owners; all ranks do this together.

        Raises ZiphiusError where pieces do not make up a weight.
        """
        held = [(name, list(tensor.shape), split_of(name)) for name, tensor in weights]
        found: dict[str, _Found] = {}
        for place, told in enumerate(gather_json(axis, held)):
            for name, shape, split in told:
                found.setdefault(name, _Found({}, {})).add(place, shape, split)
        loads = [0] * axis.size
        return cls([f.entry(name, loads) for name, f in found.items()], axis.place, split_of)

    def owns(self, name: str) -> bool:
        """Say whether this rank answers for what it holds of a weight."""
        return self.piece(name).owner == self.place

    def piece(self, name: str) -> Piece:
        """Return what this rank holds of a weight."""
        return next(p for p in self.entries[name].pieces if self.place in p.holders)

    @torch.no_grad()
    def bring(self, owned: Mapping[str, Tensor], weights: Named, axis: Axis) -> None:
        """Overwrite weights, on all ranks that hold them, with what their owners have.

        All ranks of the axis do this together. Memory is one weight.
        """
        held: dict[str, list[Tensor]] = {}
        for name, weight in weights:
            held.setdefault(name, []).append(weight)
        # One order on all ranks, so that nobody waits for one that waits for it.
        for name in self.entries:
            if name in held:
                self._bring(name, owned, held[name], axis)

    def _bring(
        self, name: str, owned: Mapping[str, Tensor], views: list[Tensor], axis: Axis
    ) -> None:
        piece = self.piece(name)
        if piece.owner == self.place:
            value = owned[name].to(views[0].device, views[0].dtype).contiguous()
            others = [place for place in piece.holders if place != self.place]
            sent = [axis.start_send(value, place, what=name) for place in others]
        else:
            value, sent = torch.empty_like(views[0]), []
            axis.start_receive(value, piece.owner, what=name).wait()
        for view in views:
            view.copy_(value)
        for pending in sent:
            pending.wait()


@dataclass
class _Found:
    """What was told of one weight: the shape of the whole one and who has which piece."""

    shapes: dict[tuple[Numbers, int], None]
    holders: dict[tuple[int, int], list[int]]

    def add(self, place: int, shape: list[int], split: list[Any] | None) -> None:
        dim, start, _, length = split or (0, 0, 0, shape[0])
        whole = list(shape)
        whole[dim] = length
        self.shapes[tuple(whole), dim] = None
        places = self.holders.setdefault((start, shape[dim]), [])
        if place not in places:  # one rank may have two copies
            places.append(place)

    def entry(self, name: str, loads: list[int]) -> Entry:
        (whole, dim), *others = self.shapes
        parts = sorted(self.holders)
        ends = [0, *(start + size for start, size in parts)]
        if others or ends[:-1] != [start for start, _ in parts] or ends[-1] != whole[dim]:
            raise ZiphiusError(
                f"{name}: ranks hold {parts} of {list(self.shapes)}: no whole weight"
            )
        row = prod(whole) // max(1, whole[dim])
        pieces = tuple(_owned(*part, self.holders[part], row, loads) for part in parts)
        writer = min((p.owner for p in pieces), key=lambda place: (loads[place], place))
        return Entry(name, whole, dim, pieces, writer)


def _owned(start: int, size: int, holders: list[int], row: int, loads: list[int]) -> Piece:
    owner = min(holders, key=lambda place: (loads[place], place))
    loads[owner] += size * row
    return Piece(start, size, tuple(sorted(holders)), owner)


def owned(owners: Owners, weights: Named) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights, or pieces of them, that this rank answers for, each once."""
    seen: set[str] = set()
    for name, weight in weights:
        if name not in seen and owners.owns(name):
            seen.add(name)
            yield name, weight
