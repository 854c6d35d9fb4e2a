"""Text to token ids, once, for many runs: reads, cleans, deduplicates, holds out, encodes.

Memory holds some batches of texts, and of every document its name and fingerprint (about 3 kB). The
texts that no rule removes lie on the disk, beside the output, until it is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ziphius.checkpoint.files import replace_directory
from ziphius.config.data import DataConfig
from ziphius.config.errors import BadInput
from ziphius.config.recipe import Recipe
from ziphius.data.corpus import packages
from ziphius.data.documents import Document, digest_of_texts, name_hash
from ziphius.data.engine import Engine
from ziphius.data.examine import Examined
from ziphius.data.prepared import (
    FORMAT,
    HELDOUT_FILE,
    PREPARED_FILE,
    REMOVED_FILE,
    Prepared,
    describe_counts,
    heldout_line,
    is_prepared,
    open_prepared,
    removed_line,
)
from ziphius.data.removed import Removed, count_reasons
from ziphius.data.selection import Progress, Selection, divide_documents, select
from ziphius.data.shards import SHARD_TOKENS, ShardWriter
from ziphius.data.sources import Source, describe_sources, open_sources, total_bytes
from ziphius.data.spool import Span, Spool, read_spans
from ziphius.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

_SPOOL_FILE = ".texts"


@dataclass(frozen=True)
class _Text:
    """A document that stays, with the place of its text in the spool."""

    source: int
    name: str
    digest: bytes
    span: Span
    project: str

    @property
    def size(self) -> int:
        return self.span[1] - self.span[0]


@dataclass(frozen=True)
class _Divided:
    """What stays, as it is written: the training texts by source and name."""

    train: tuple[_Text, ...]
    heldout: tuple[Document, ...]


def prepare(
    recipe: Recipe,
    out: Path,
    engine: Engine,
    on_progress: Progress | None = None,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> Prepared:
    """Prepare the recipe's text in the new folder ``out``, which appears whole or not at all.

    The tokenizer is the recipe's, or is trained on ``data.tokenizer_bytes`` of the training text.
    The bytes of all files depend on the recipe and the sources only, not on ``engine``.
    Raises BadInput for an ``out`` that holds something, for bad sources, and for a full disk.
    """
    tell = on_progress or _silent
    _require_room(out)
    tokenizer = _tokenizer_of(recipe)
    sources = open_sources(recipe.data)
    with replace_directory(out, keep_unknown=False) as folder:
        with Spool(folder / _SPOOL_FILE) as spool:
            documents, removed = _examine(sources, recipe.data, engine, spool, tell)
            selection = select(documents, removed, sources, recipe.data, tell)
            _write_lines(folder / REMOVED_FILE, map(removed_line, selection.removed))
            texts = _divide(documents, selection, recipe.data, spool)
            del documents, removed
            _write_lines(folder / HELDOUT_FILE, map(heldout_line, texts.heldout))
            if tokenizer is None:
                tokenizer = _train(recipe, sources, texts.train, spool, tell)
            save_tokenizer(tokenizer, folder)
            written = _encode(folder, sources, texts.train, tokenizer, engine, spool, tell,
                              shard_tokens)  # fmt: skip
        description = {
            "format": FORMAT,
            "description": describe_sources(sources),
            "sha256": _sha256(texts),
            "settings": {
                "data": recipe.data.preparation,
                "tokenizer": recipe.tokenizer.model_dump(mode="json"),
            },
            "vocab_size": tokenizer.get_vocab_size(with_added_tokens=True),
            "sources": written,
            "heldout": {
                "documents": len(texts.heldout),
                "bytes": sum(document.size for document in texts.heldout),
                "packages": list(packages(texts.heldout)),
            },
            "removed": describe_counts(count_reasons(selection.removed)),
        }
        (folder / PREPARED_FILE).write_bytes(json.dumps(description, indent=1).encode() + b"\n")
    return open_prepared(out, checksums=False)


def _silent(phase: str, done: int, total: int | None) -> None:
    pass


def _require_room(out: Path) -> None:
    try:
        if out.exists() and not out.is_dir():
            raise BadInput(f"--out {out}: is a file: choose a new folder")
        if not out.is_dir() or not any(out.iterdir()):
            return
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}: choose a new folder") from None
    held = "prepared text already" if is_prepared(out) else "files"
    raise BadInput(f"--out {out}: holds {held}: choose a new folder, or remove this one")


def _tokenizer_of(recipe: Recipe) -> Tokenizer | None:
    """Load the recipe's tokenizer; None if it has to be trained."""
    if recipe.tokenizer.path is None:
        return None
    tokenizer = load_tokenizer(Path(recipe.tokenizer.path))
    if (largest := _largest_id(tokenizer)) >= recipe.model.vocab_size:
        raise BadInput(
            f"tokenizer {recipe.tokenizer.path}: has token ids up to {largest}, model.vocab_size "
            f"is {recipe.model.vocab_size}: set model.vocab_size to more than that"
        )
    return tokenizer


def _examine(
    sources: Sequence[Source], config: DataConfig, engine: Engine, spool: Spool, tell: Progress
) -> tuple[list[Examined], list[Removed]]:
    """Return what stays, in the order of the spool, and what no longer does."""
    pieces = [piece for source in sources for piece in source.pieces]
    documents: list[Examined] = []
    removed: list[Removed] = []
    done, total = 0, total_bytes(sources)
    for examined in engine.examined(pieces, config):
        if examined.reason:
            removed.append(examined.removed())
        else:
            spool.append(examined.text)
            documents.append(examined.without_text())
        done += examined.cost
        tell("reading", done, total)
    spool.flush()
    return documents, removed


def _divide(
    documents: Sequence[Examined], selection: Selection, config: DataConfig, spool: Spool
) -> _Divided:
    def read(place: int) -> Document:
        found = documents[place]
        return Document(found.name, spool.text(place), found.source, found.is_record)

    def written(place: int) -> _Text:
        found = documents[place]
        whole = Document(found.name, "", is_record=found.is_record)
        return _Text(found.source, found.name, found.digest, spool.span(place), whole.project)

    train = [written(place) for place in selection.train]
    divided = map(read, selection.divided)
    first, last = divide_documents(divided, config, bool(selection.heldout))
    for place, part in zip(selection.divided, first, strict=True):
        start = spool.span(place)[0]  # the lines that train are the first ones
        span = start, start + part.size
        train.append(_Text(part.source, part.name, part.digest, span, part.project))
    heldout = [*map(read, selection.heldout), *last]
    return _Divided(
        tuple(sorted(train, key=lambda text: (text.source, text.name))),
        tuple(sorted(heldout, key=lambda document: (document.source, document.name))),
    )


def _train(
    recipe: Recipe,
    sources: Sequence[Source],
    texts: Sequence[_Text],
    spool: Spool,
    tell: Progress,
) -> Tokenizer:
    weights = [source.config.weight for source in sources]
    spans = tokenizer_sample(texts, weights, recipe.data.tokenizer_bytes)
    total = sum(stop - start for start, stop in spans)

    def sample() -> Iterator[str]:
        done = 0
        for (start, stop), text in zip(spans, read_spans(spool.path, spans), strict=True):
            yield text
            done += stop - start
            tell("training the tokenizer", done, total)

    return train_tokenizer(sample(), recipe.tokenizer.vocab_size)


def tokenizer_sample(
    texts: Sequence[_Text], weights: Sequence[float], most_bytes: int
) -> list[Span]:
    """Return the places of the texts that a tokenizer is trained on.

    A source has a share of ``most_bytes`` that is its weight's, and gives all of its texts, or
    those with the smallest hashes of their names that fit, at least one.
    """
    chosen: list[Span] = []
    for index, weight in enumerate(weights):
        share = int(most_bytes * weight / sum(weights))
        own = [text for text in texts if text.source == index]
        if sum(text.size for text in own) > share:
            own.sort(key=lambda text: name_hash(text.name))
            own = _fitting(own, share)
        chosen += [text.span for text in own]
    return chosen


def _fitting(texts: Sequence[_Text], most_bytes: int) -> list[_Text]:
    fitting = []
    for text in texts:
        if text.size <= most_bytes:
            most_bytes -= text.size
            fitting.append(text)
    return fitting or [min(texts, key=lambda text: text.size)]


def _encode(
    folder: Path,
    sources: Sequence[Source],
    texts: Sequence[_Text],
    tokenizer: Tokenizer,
    engine: Engine,
    spool: Spool,
    tell: Progress,
    shard_tokens: int,
) -> list[dict[str, Any]]:
    """Write every source's shards; return their descriptions."""
    dtype = "<u2" if _largest_id(tokenizer) < 2**16 else "<u4"
    encoded = engine.encoded(spool.path, [text.span for text in texts], tokenizer)
    done, total = 0, sum(text.size for text in texts)
    written = []
    for index, source in enumerate(sources):
        own = [text for text in texts if text.source == index]
        name = f"source-{index:02d}"
        with ShardWriter(folder / name, dtype, shard_tokens) as writer:
            for text, ids in zip(own, encoded, strict=False):
                writer.append(text.name, ids, text.project)
                done += text.size
                tell("encoding", done, total)
        written.append(
            {
                "folder": name,
                **source.config.model_dump(mode="json"),
                "description": source.description,
                "documents": len(own),
                "bytes": sum(text.size for text in own),
                "tokens": writer.tokens,
                "dtype": dtype,
                "fingerprint": writer.fingerprint,
                "shards": [asdict(shard) for shard in writer.shards],
            }
        )
    return written


def _largest_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values())


def _sha256(texts: _Divided) -> str:
    return digest_of_texts(
        [
            *((text.source, text.name, text.digest) for text in texts.train),
            *((text.source, text.name, text.digest) for text in texts.heldout),
        ]
    )


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    with open(path, "xb") as file:
        file.writelines(lines)
