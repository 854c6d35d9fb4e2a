"""What was left out of a corpus, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

NOT_UTF8 = "not UTF-8"
EMPTY = "empty"
BINARY = "binary"
CONTROL_CHARACTERS = "control characters"
TOO_SHORT = "too short"
REPEATED_LINES = "repeated lines"
EXACT_DUPLICATE = "exact duplicate"
NEAR_DUPLICATE = "near duplicate"
# In the order of the steps.
REASONS = (
    *(NOT_UTF8, EMPTY, BINARY, CONTROL_CHARACTERS, TOO_SHORT, REPEATED_LINES),
    *(EXACT_DUPLICATE, NEAR_DUPLICATE),
)

_EXAMPLES = 3


@dataclass(frozen=True)
class Removed:
    """A document that was left out.

    ``bytes`` is the size of its cleaned text, or of the file if that is no text. ``copy_of`` and
    ``copy_of_source`` name the document that a duplicate copies; ``similarity`` is the estimated
    Jaccard similarity to it, 1 for an exact copy.
    """

    source: int
    name: str
    reason: str
    bytes: int
    copy_of: str | None = None
    copy_of_source: int | None = None
    similarity: float | None = None


@dataclass(frozen=True)
class ReasonCount:
    """How many documents, and bytes of them, one reason removed, with examples of their names."""

    reason: str
    documents: int
    bytes: int
    examples: tuple[str, ...]


def count_reasons(removed: Iterable[Removed]) -> tuple[ReasonCount, ...]:
    """Count what was removed by reason, in the order of the steps."""
    by_reason: dict[str, list[Removed]] = {}
    for document in removed:
        by_reason.setdefault(document.reason, []).append(document)
    return tuple(
        ReasonCount(
            reason,
            len(group),
            sum(document.bytes for document in group),
            tuple(_example(document) for document in group[:_EXAMPLES]),
        )
        for reason in REASONS
        if (group := by_reason.get(reason))
    )


def tell_reasons(counts: Iterable[ReasonCount]) -> str:
    """Say in a few words what was removed: ``3 too short, 1 binary``."""
    return ", ".join(f"{count.documents:,} {count.reason}" for count in counts) or "nothing removed"


def _example(document: Removed) -> str:
    if document.copy_of is None:
        return document.name
    if document.reason == EXACT_DUPLICATE:
        return f"{document.name} = {document.copy_of}"
    return f"{document.name} ~ {document.copy_of} ({document.similarity:.2f})"
