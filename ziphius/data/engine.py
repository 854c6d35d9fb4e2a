"""Who runs the operators of data preparation: this process, or several on this machine.

An engine decides where a batch is worked on and nothing else. The operators look at one text at a
time and results come in the order of the input, so all engines give the same bytes.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ziphius.config.data import DataConfig
from ziphius.config.errors import ZiphiusError
from ziphius.data.documents import Document
from ziphius.data.encode import encode
from ziphius.data.examine import Examined, examine
from ziphius.data.readers import Piece, read_piece
from ziphius.data.spool import Span, read_spans

Item = TypeVar("Item")
Result = TypeVar("Result")
Ids = NDArray[np.int32]

# A batch ends with the text that brings it to so many bytes.
EXAMINE_BYTES = 2**22
ENCODE_BYTES = 2**24
# A tokenizer needs about a hundred bytes of memory for a byte of text.
_PART_CHARACTERS = 2**18


class Engine(Protocol):
    """Runs the two operators over everything, between entering and leaving its ``with`` block."""

    def examined(self, pieces: Sequence[Piece], config: DataConfig) -> Iterator[Examined]:
        """Read all pieces, and examine their texts."""
        ...

    def encoded(self, spool: Path, spans: Sequence[Span], tokenizer: Tokenizer) -> Iterator[Ids]:
        """Encode the texts at these places of a spool: BOS, tokens, EOS."""
        ...


class LocalEngine:
    """Runs in this process, or with more than one worker in as many others."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def examined(self, pieces: Sequence[Piece], config: DataConfig) -> Iterator[Examined]:
        """Read all pieces here, and examine their texts."""
        raws = chain.from_iterable(map(read_piece, pieces))
        batches = batched(raws, lambda raw: len(raw.text), EXAMINE_BYTES)
        yield from self._map(partial(examine, config=config), batches)

    def encoded(self, spool: Path, spans: Sequence[Span], tokenizer: Tokenizer) -> Iterator[Ids]:
        """Encode the texts at these places of a spool."""
        if self.workers == 1:
            yield from encode_spans(spans, spool, tokenizer)
            return
        batches = batched(spans, lambda span: span[1] - span[0], ENCODE_BYTES)
        operator = partial(encode_span_list, spool=spool, tokenizer=tokenizer)
        yield from self._map(operator, batches)

    def _map(
        self, operator: Callable[[list[Item]], list[Result]], batches: Iterable[list[Item]]
    ) -> Iterator[Result]:
        iterator = iter(batches)
        first = list(islice(iterator, 2))
        batches = chain(first, iterator)
        if self.workers == 1 or len(first) < 2:  # one batch is not worth another process
            for batch in batches:
                yield from operator(batch)
            return
        if self._pool is None:
            # Fresh processes: a copy of this one would have its locks without its threads.
            context = get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_leave_ctrl_c)
        try:
            yield from _ahead(self._pool, operator, batches, 2 * self.workers)
        except BrokenProcessPool:
            raise ZiphiusError(
                "a worker process ended without a word, most likely for lack of memory: "
                "run with fewer --workers"
            ) from None


def batched(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Yield the items in lists that are complete when their sizes add up to ``most``."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= most:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def encode_spans(spans: Iterable[Span], spool: Path, tokenizer: Tokenizer) -> Iterator[Ids]:
    """Encode texts of a spool one after the other: the second operator of data preparation."""
    documents: deque[int] = deque()

    def parts() -> Iterator[Document]:
        for text in read_spans(spool, spans):
            some = cut_long_text(text)
            documents.append(len(some))
            yield from (Document("", part) for part in some)

    encodings = encode(parts(), tokenizer)
    for first in encodings:
        others = [ids[1:] for ids in islice(encodings, documents.popleft() - 1)]
        yield np.concatenate([first[:-1], *(ids[:-1] for ids in others), first[-1:]])


def encode_span_list(spans: list[Span], spool: Path, tokenizer: Tokenizer) -> list[Ids]:
    """Encode texts of a spool, all at once."""
    return list(encode_spans(spans, spool, tokenizer))


def cut_long_text(text: str, characters: int = _PART_CHARACTERS) -> list[str]:
    """Cut a long text into parts whose tokens, one after the other, are the tokens of the text.

    A cut is where a line begins with an ASCII letter: no word of the pre-tokeniser goes across.
    """
    parts, start = [], 0
    while len(text) - start > characters:
        cut = start + characters
        while (cut := text.find("\n", cut) + 1) and not _begins_word(text, cut):
            pass
        if not cut:
            break
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]


def _begins_word(text: str, place: int) -> bool:
    return text[place : place + 1].isascii() and text[place : place + 1].isalpha()


def _ahead(
    pool: ProcessPoolExecutor,
    operator: Callable[[list[Item]], list[Result]],
    batches: Iterable[list[Item]],
    most: int,
) -> Iterator[Result]:
    """Yield results in the order of the batches, with ``most`` batches under way."""
    waiting: deque[Future[list[Result]]] = deque()
    for batch in batches:
        waiting.append(pool.submit(operator, batch))
        if len(waiting) > most:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _leave_ctrl_c() -> None:
    """Let the parent answer Ctrl-C, which the terminal sends to every process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
