"""Which documents are held out for validation: chosen by name, so that the choice hardly moves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ziphius.data.documents import Document, name_hash, package_of


class Held(Protocol):
    """What the choice depends on; the text is not among it."""

    @property
    def name(self) -> str: ...

    @property
    def is_record(self) -> bool: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class Choice:
    """Places of the documents that are held out. Of ``divided`` only the last lines are."""

    whole: frozenset[int] = frozenset()
    divided: int | None = None


def choose_heldout(
    documents: Sequence[Held], every: int, max_bytes: int, protected: frozenset[str] = frozenset()
) -> Choice:
    """Choose the held-out documents of one source, ``max_bytes`` in all.

    Whole packages of files and single records are held out: those whose name has a SHA-256 that
    ``every`` divides, but none of ``protected``, the smallest hashes first as long as they fit.
    Where this picks none or all, the last package or record is held out; where that does not fit,
    single files, picked like records; of a single package, or where none of them fits, the last
    document; of a single document, the last lines. Last is meant by name.
    """
    if not documents:
        return Choice()
    by_name = sorted(range(len(documents)), key=lambda place: documents[place].name)
    last = by_name[-1]
    if len(documents) == 1:
        return Choice(divided=last)
    units = _units(documents, by_name)
    if len(units) > 1:
        picked = [u for u in _picked(units, every) if u.name not in protected]
        single = [_Unit(documents[p].name, (p,), documents[p].size) for p in by_name]
        for choice in (_fitting(picked, max_bytes), _fitting(units[-1:], max_bytes)):
            if choice and len(choice) < len(documents):
                return Choice(frozenset(choice))
        if choice := _fitting(_picked(single, every), max_bytes):
            return Choice(frozenset(choice))
    if documents[last].size <= max_bytes:
        return Choice(frozenset({last}))
    return Choice(divided=last)


def divide(document: Document, every: int, max_bytes: int) -> tuple[Document, Document] | None:
    """Divide a document into its training and its held-out lines; None if it has only one line.

    Held out are the last ``1 / every`` of the lines, fewer if they exceed ``max_bytes``, at least
    one.
    """
    lines = document.text.splitlines(keepends=True)
    if len(lines) < 2:
        return None
    cut = len(lines) - max(1, len(lines) // every)
    size = sum(len(line.encode()) for line in lines[cut:])
    while cut < len(lines) - 1 and size > max_bytes:
        size -= len(lines[cut].encode())
        cut += 1

    def part(end: str, some: Iterable[str]) -> Document:
        name = f"{document.name}#{end}"
        return Document(name, "".join(some), document.source, document.is_record)

    return part("train", lines[:cut]), part("heldout", lines[cut:])


@dataclass(frozen=True)
class _Unit:
    """Documents that are held out together."""

    name: str
    places: tuple[int, ...]
    size: int


def _units(documents: Sequence[Held], by_name: Iterable[int]) -> list[_Unit]:
    """Return packages and records, sorted by name."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for place in by_name:
        document = documents[place]
        name = document.name if document.is_record else package_of(document.name)
        groups.setdefault((name, document.is_record), []).append(place)
    return [
        _Unit(name, tuple(places), sum(documents[place].size for place in places))
        for (name, _), places in sorted(groups.items())
    ]


def _picked(units: Iterable[_Unit], every: int) -> list[_Unit]:
    """Return the units that the rule picks, the smallest hash first."""
    hashed = ((name_hash(unit.name), unit) for unit in units)
    chosen = [(value, unit) for value, unit in hashed if value % every == 0]
    return [unit for _, unit in sorted(chosen, key=lambda pair: (pair[0], pair[1].name))]


def _fitting(units: Iterable[_Unit], max_bytes: int) -> set[int]:
    """Return the places of the units, in their order, that fit together."""
    places: set[int] = set()
    for unit in units:
        if unit.size <= max_bytes:
            max_bytes -= unit.size
            places.update(unit.places)
    return places
