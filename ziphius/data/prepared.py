"""A folder that ``ziphius prepare`` made: text that is ready to train on.

prepared.json            settings, counts, what was removed and why, the files of every source
tokenizer.json           and tokenizer_config.json
source-NN/               a source's documents as token ids: see ``shards``
heldout.jsonl            the held-out documents, a JSON object a line
removed.jsonl            every document that was left out, why, and of what it is a copy
manifest.json            size and SHA-256 of every file
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ziphius.checkpoint.files import MANIFEST, check_manifest
from ziphius.config.data import DataConfig
from ziphius.config.errors import BadInput
from ziphius.config.moment import WHOLE_RUN, Span
from ziphius.data.documents import Document
from ziphius.data.removed import NOT_UTF8, ReasonCount, Removed
from ziphius.data.shards import Shard, TokenShards
from ziphius.data.tokenizer import load_tokenizer

PREPARED_FILE = "prepared.json"
HELDOUT_FILE = "heldout.jsonl"
REMOVED_FILE = "removed.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class Prepared:
    """Prepared text: token ids on the disk, and the held-out documents in memory.

    ``sources`` are what a loader takes: documents as token ids, and the source's weight; ``spans``
    say when each is read.
    ``documents``, ``train_bytes`` (UTF-8) and ``tokens`` (BOS and EOS included) count the training
    text, ``sha256`` is over names and texts of all documents, the held-out ones included; the same
    text read into memory has the same.
    """

    path: Path
    tokenizer: Tokenizer
    sources: tuple[tuple[TokenShards, float], ...]
    heldout: tuple[Document, ...]
    description: str
    sha256: str
    documents: int
    train_bytes: int
    heldout_bytes: int
    heldout_packages: tuple[str, ...]
    tokens: int
    removed_counts: tuple[ReasonCount, ...]
    spans: tuple[Span, ...]

    @property
    def skipped(self) -> int:
        """How many files are not UTF-8."""
        return sum(count.documents for count in self.removed_counts if count.reason == NOT_UTF8)


def is_prepared(path: Path) -> bool:
    """Say whether ``ziphius prepare`` made this folder."""
    return (path / PREPARED_FILE).is_file()


def prepared_folder(config: DataConfig) -> Path | None:
    """Return the prepared folder that is the only source, or None if text has to be read."""
    if len(config.mixture) != 1:
        return None
    path = Path(config.mixture[0].path).expanduser()
    return path if is_prepared(path) else None


def open_prepared(path: Path, *, checksums: bool = True) -> Prepared:
    """Open a folder of prepared text.

    With ``checksums`` every byte is read once and compared with the manifest, else only the files'
    sizes are. Raises BadInput, which names the file, for one that is missing or damaged.
    """
    if not is_prepared(path):
        raise BadInput(f"{path}: has no {PREPARED_FILE}: give a folder that 'ziphius prepare' made")
    if not (path / MANIFEST).is_file():
        raise BadInput(f"{path / MANIFEST}: is missing: prepare the text again, or copy it again")
    check_manifest(path, checksums=checksums)
    try:
        described = json.loads((path / PREPARED_FILE).read_bytes())
        if described["format"] != FORMAT:
            raise BadInput(
                f"{path / PREPARED_FILE}: is of format {described['format']}, not {FORMAT}: "
                "prepare the text again with this version"
            )
        return _open(path, described)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path / PREPARED_FILE}: is damaged ({type(error).__name__}: {error}): prepare the "
            "text again, or copy it again"
        ) from None


def describe_counts(counts: Iterable[ReasonCount]) -> list[dict[str, Any]]:
    """Return the counts as JSON."""
    return [asdict(count) for count in counts]


def heldout_line(document: Document) -> bytes:
    """Return a held-out document as a line of ``heldout.jsonl``."""
    return _line(asdict(document))


def removed_line(removed: Removed) -> bytes:
    """Return the entry of a document as a line of ``removed.jsonl``."""
    return _line({key: value for key, value in asdict(removed).items() if value is not None})


def _line(record: Mapping[str, Any]) -> bytes:
    # Only ASCII: a name can hold bytes that are no UTF-8.
    return json.dumps(record).encode() + b"\n"


def _open(path: Path, described: Mapping[str, Any]) -> Prepared:
    with open(path / HELDOUT_FILE, "rb") as file:
        heldout = tuple(Document(**json.loads(line)) for line in file)
    return Prepared(
        path,
        load_tokenizer(path),
        tuple(
            (
                TokenShards(
                    path / source["folder"],
                    [Shard(**shard) for shard in source["shards"]],
                    source["fingerprint"],
                ),
                source["weight"],
            )
            for source in described["sources"]
        ),
        heldout,
        described["description"],
        described["sha256"],
        sum(source["documents"] for source in described["sources"]),
        sum(source["bytes"] for source in described["sources"]),
        described["heldout"]["bytes"],
        tuple(described["heldout"]["packages"]),
        sum(source["tokens"] for source in described["sources"]),
        tuple(
            ReasonCount(**{**count, "examples": tuple(count["examples"])})
            for count in described["removed"]
        ),
        # Folders that were made before sources had them have none.
        tuple(
            (source.get("begin", WHOLE_RUN[0]), source.get("end", WHOLE_RUN[1]))
            for source in described["sources"]
        ),
    )
