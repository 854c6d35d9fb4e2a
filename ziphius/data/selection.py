"""Which of the examined texts stay, which train and which are held out.

This needs every text's name and fingerprint at once, but no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ziphius.config.data import DataConfig
from ziphius.config.errors import BadInput
from ziphius.data.deduplicate import HASHES, exact_copies, near_copies
from ziphius.data.documents import Document
from ziphius.data.examine import Examined
from ziphius.data.holdout import choose_heldout, divide
from ziphius.data.removed import (
    EXACT_DUPLICATE,
    NEAR_DUPLICATE,
    Removed,
    count_reasons,
    tell_reasons,
)
from ziphius.data.sources import Source

Progress = Callable[[str, int, int | None], None]
"""Called with the name of a phase, how much of it is done, and of how much if that is known."""

_TOLD_EVERY = 1024


@dataclass(frozen=True)
class Selection:
    """Documents by their places in what was examined, each tuple sorted by source and name.

    Of ``divided`` documents the first lines train and the last are held out; they are in neither of
    the other two.
    """

    train: tuple[int, ...]
    heldout: tuple[int, ...]
    divided: tuple[int, ...]
    removed: tuple[Removed, ...]


def select(
    documents: Sequence[Examined],
    removed: Iterable[Removed],
    sources: Sequence[Source],
    config: DataConfig,
    on_progress: Progress | None = None,
) -> Selection:
    """Remove duplicates, then choose what is held out.

    ``documents`` are those that no rule has ``removed``; their order changes nothing but the
    places. Raises BadInput if a source has no document left; it says what removed them.
    """
    order = sorted(range(len(documents)), key=lambda place: _key(documents[place]))
    left_out = list(removed)
    for copies in (_exact, _near):
        copied = set()
        for place, original, similarity in copies(documents, order, config, on_progress):
            left_out.append(_copy(documents[place], documents[original], similarity))
            copied.add(place)
        order = [place for place in order if place not in copied]
    left_out.sort(key=lambda document: (document.source, document.name))
    whole, divided = set(), set()
    for index, source in enumerate(sources):
        own = [place for place in order if documents[place].source == index]
        if not own:
            raise BadInput(_nothing_left(source, index, left_out))
        if not source.config.holdout:
            continue
        choice = choose_heldout(
            [documents[place] for place in own],
            config.holdout_every,
            config.holdout_bytes,
            source.protected,
        )
        whole |= {own[place] for place in choice.whole}
        divided |= {own[choice.divided]} if choice.divided is not None else set()
    return Selection(
        tuple(place for place in order if place not in whole | divided),
        tuple(place for place in order if place in whole),
        tuple(place for place in order if place in divided),
        tuple(left_out),
    )


def divide_documents(
    documents: Iterable[Document], config: DataConfig, has_heldout: bool
) -> tuple[list[Document], list[Document]]:
    """Divide the ``divided`` documents into training and held-out ones.

    One with a single line trains. Raises BadInput if then nothing is held out at all.
    """
    train: list[Document] = []
    heldout: list[Document] = []
    for document in documents:
        parts = divide(document, config.holdout_every, config.holdout_bytes)
        train.append(parts[0] if parts else document)
        heldout += parts[1:] if parts else ()
    if not heldout and not has_heldout:
        raise BadInput(
            f"data.source: {train[0].name} is one line, so no line is left to hold out for "
            "validation: give a text of several lines or a folder"
        )
    return train, heldout


def _key(document: Examined) -> tuple[int, str]:
    return document.source, document.name


Copies = Iterator[tuple[int, int, float]]


def _exact(
    documents: Sequence[Examined],
    order: Sequence[int],
    config: DataConfig,
    on_progress: Progress | None,
) -> Copies:
    if config.deduplicate == "none":
        return
    for copy, original in exact_copies([documents[place].digest for place in order]).items():
        yield order[copy], order[original], 1.0


def _near(
    documents: Sequence[Examined],
    order: Sequence[int],
    config: DataConfig,
    on_progress: Progress | None,
) -> Copies:
    if config.deduplicate != "near":
        return
    order = [place for place in order if documents[place].fingerprint]
    prints = b"".join(documents[place].fingerprint for place in order)
    prints_NP = np.frombuffer(prints, dtype="<u4").reshape(-1, HASHES)
    for row, copied in near_copies(prints_NP, config.near_threshold):
        if on_progress is not None and (row + 1) % _TOLD_EVERY == 0:
            on_progress("comparing", row + 1, len(order))
        if copied is not None:
            yield order[row], order[copied[0]], copied[1]


def _copy(document: Examined, original: Examined, similarity: float) -> Removed:
    reason = EXACT_DUPLICATE if document.digest == original.digest else NEAR_DUPLICATE
    return Removed(
        document.source,
        document.name,
        reason,
        document.size,
        original.name,
        original.source,
        similarity,
    )


def _nothing_left(source: Source, index: int, removed: Iterable[Removed]) -> str:
    own = count_reasons(document for document in removed if document.source == index)
    return (
        f"{source.label} = '{source.config.path}': no text left to train on: {tell_reasons(own)}: "
        "give more text, or change the [data] settings that removed it"
    )
