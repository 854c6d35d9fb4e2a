"""A corpus in memory: cleaned, without copies, and divided into training and held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from ziphius.config.data import DataConfig
from ziphius.config.moment import WHOLE_RUN, Span
from ziphius.data.documents import Document, digest_of_texts
from ziphius.data.examine import Examined, examine
from ziphius.data.readers import Raw, read_piece
from ziphius.data.removed import NOT_UTF8, ReasonCount, Removed, count_reasons
from ziphius.data.selection import Progress, divide_documents, select
from ziphius.data.sources import Source, describe_sources, open_sources, total_bytes

_AT_ONCE = 64


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents, each sorted by source and name, and what was left out.

    ``weights`` are the sources' shares of the training tokens, relative to each other; ``spans``
    say when each is read.
    """

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    description: str
    removed: tuple[Removed, ...] = ()
    weights: tuple[float, ...] = (1.0,)
    spans: tuple[Span, ...] = (WHOLE_RUN,)

    @cached_property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the training documents."""
        return sum(document.size for document in self.train)

    @cached_property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents."""
        return sum(document.size for document in self.heldout)

    @property
    def heldout_packages(self) -> tuple[str, ...]:
        """Names of the packages that are held out, sorted. Records have none."""
        return packages(self.heldout)

    @property
    def skipped(self) -> int:
        """How many files are not UTF-8."""
        return sum(document.reason == NOT_UTF8 for document in self.removed)

    @cached_property
    def removed_counts(self) -> tuple[ReasonCount, ...]:
        """What was left out, counted by reason, in the order of the steps."""
        return count_reasons(self.removed)

    @property
    def train_by_source(self) -> tuple[tuple[tuple[Document, ...], float], ...]:
        """The training documents of every source, and its weight."""
        return tuple(
            (tuple(document for document in self.train if document.source == index), weight)
            for index, weight in enumerate(self.weights)
        )

    @cached_property
    def sha256(self) -> str:
        """Hex digest over sources, names and texts of all documents, whatever their order."""
        documents = (*self.train, *self.heldout)
        return digest_of_texts((d.source, d.name, d.digest) for d in documents)


def read_corpus(config: DataConfig, on_progress: Progress | None = None) -> Corpus:
    """Read the sources that ``config`` names into memory: clean, deduplicated and divided.

    ``on_progress`` is called now and then; reading is counted in bytes on the disk. Duplicates go
    before the held-out documents are chosen, so that these have no copies in training.
    Raises BadInput for a source that is missing, unreadable, damaged or without text.
    """
    sources = open_sources(config)
    documents: list[Examined] = []
    removed: list[Removed] = []
    for examined in _examined(sources, config, on_progress):
        if examined.reason:
            removed.append(examined.removed())
        else:
            documents.append(examined)
    selection = select(documents, removed, sources, config, on_progress)

    def some(places: Iterable[int]) -> list[Document]:
        return [_document(documents[place]) for place in places]

    train, heldout = divide_documents(some(selection.divided), config, bool(selection.heldout))
    return Corpus(
        _sorted((*some(selection.train), *train)),
        _sorted((*some(selection.heldout), *heldout)),
        describe_sources(sources),
        selection.removed,
        tuple(source.config.weight for source in sources),
        tuple((source.config.begin, source.config.end) for source in sources),
    )


def read_raws(sources: Iterable[Source]) -> Iterator[Raw]:
    """Yield the texts of all sources, one after the other."""
    for source in sources:
        for piece in source.pieces:
            yield from read_piece(piece)


def packages(documents: Iterable[Document]) -> tuple[str, ...]:
    """Return the names of the documents' packages, sorted. Records have none."""
    return tuple(sorted({document.package for document in documents if not document.is_record}))


def _examined(
    sources: Iterable[Source], config: DataConfig, on_progress: Progress | None
) -> Iterator[Examined]:
    raws, done, total = read_raws(sources), 0, total_bytes(sources)
    while some := list(islice(raws, _AT_ONCE)):
        yield from examine(some, config)
        done += sum(raw.cost for raw in some)
        if on_progress is not None:
            on_progress("reading", done, total)


def _document(examined: Examined) -> Document:
    return Document(examined.name, examined.text, examined.source, examined.is_record)


def _sorted(documents: Iterable[Document]) -> tuple[Document, ...]:
    return tuple(sorted(documents, key=lambda document: (document.source, document.name)))
