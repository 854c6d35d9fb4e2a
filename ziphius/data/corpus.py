"""Where the text comes from, and which part of it is held out for validation."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from ziphius.config.data import DataConfig
from ziphius.config.errors import BadInput

TEXT_SUFFIXES = frozenset({".txt", ".md", ".py", ".rst"})

# Tests repeat themselves, and the package folders are not the standard library.
_STDLIB_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
# These describe how the interpreter was built, with the builder's paths in them. Without them
# two builds of one Python release give the same corpus.
_STDLIB_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

# Generated tables and generated help pages: a fifth of the library's bytes, and unlike the rest
# of it. Held out they would dominate the validation text, so they always train.
_STDLIB_NEVER_HELD_OUT = frozenset({"encodings", "pydoc_data"})


@dataclass(frozen=True)
class Document:
    """One text. ``name`` is its path inside the source, with forward slashes."""

    name: str
    text: str

    @property
    def package(self) -> str:
        """The top-level package the document is in, or its own module name."""
        first, *rest = PurePosixPath(self.name).parts
        return first if rest else PurePosixPath(first).stem

    @property
    def size(self) -> int:
        """Number of UTF-8 bytes of the text."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents, each sorted by name.

    ``skipped`` counts the files that are not UTF-8. Empty files are no documents.
    """

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    skipped: int
    description: str

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
        """Names of the packages that are held out, sorted."""
        return tuple(sorted({document.package for document in self.heldout}))

    @cached_property
    def sha256(self) -> str:
        """Hex digest over the names and bytes of all documents in the order of their names."""
        digest = hashlib.sha256()
        for document in sorted((*self.train, *self.heldout), key=lambda d: (d.name, d.text)):
            for part in (_name_bytes(document.name), document.text.encode()):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        return digest.hexdigest()


def read_corpus(config: DataConfig) -> Corpus:
    """Read the source that ``config`` names and divide it into training and held-out documents.

    The source ``stdlib`` is every ``.py`` file of the running interpreter's standard library but
    its tests. A folder gives every ``.txt``, ``.md``, ``.py`` and ``.rst`` file below it, folders
    whose name begins with a dot left out. A file is one text.

    Whole packages are held out: those whose name has a SHA-256 that ``holdout_every`` divides.
    Where this picks none or all, the last package is held out; of a single package, the last
    document; of a single document, the last ``1 / holdout_every`` of its lines.
    Raises BadInput for a source that is missing, unreadable or without text.
    """
    if config.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        documents, skipped = _read_files(root, _stdlib_files(root))
        description = f"standard library of {platform.python_implementation()} "
        description += platform.python_version()
        protected = _STDLIB_NEVER_HELD_OUT
    else:
        root = Path(config.source).expanduser()
        documents, skipped = _read_files(*_path_files(root))
        description = f"{'folder' if root.is_dir() else 'file'} {config.source}"
        protected = frozenset()
    if not documents:
        raise BadInput(
            f"data.source = '{config.source}': no UTF-8 text found in {root} "
            f"({skipped} files are not UTF-8): give 'stdlib', a text file or a folder of "
            f"{', '.join(sorted(TEXT_SUFFIXES))} files"
        )
    train, heldout = _hold_out(documents, config.holdout_every, protected)
    return Corpus(train, heldout, skipped, description)


def _stdlib_files(root: Path) -> Iterator[Path]:
    for path in _walk(root, {".py"}):
        parts = path.relative_to(root).parts
        built = parts[0].startswith(_STDLIB_SKIPPED_PREFIXES)
        if not built and _STDLIB_SKIPPED_FOLDERS.isdisjoint(parts[:-1]):
            yield path


def _path_files(root: Path) -> tuple[Path, Iterator[Path]]:
    """Return the folder that names are relative to, and the files."""
    if root.is_dir():
        return root, _walk(root, TEXT_SUFFIXES)
    if root.is_file():
        return root.parent, iter([root])
    raise BadInput(
        f"data.source = '{root}': no such file or folder: give 'stdlib', a text file or a folder"
    )


def _walk(root: Path, suffixes: set[str] | frozenset[str]) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(folder, name) for name in files if Path(name).suffix in suffixes)


def _read_files(root: Path, paths: Iterator[Path]) -> tuple[list[Document], int]:
    """Return the documents sorted by name, and how many files are not UTF-8."""
    documents, skipped = [], 0
    for path in paths:
        try:
            # Bytes are decoded as they are: no newline is translated, so that sizes are exact.
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            skipped += 1
            continue
        except OSError as error:
            raise BadInput(f"data.source: {path} cannot be read: {error.strerror}") from None
        if text:
            documents.append(Document(path.relative_to(root).as_posix(), text))
    return sorted(documents, key=lambda document: document.name), skipped


def _hold_out(
    documents: Sequence[Document], every: int, protected: frozenset[str]
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    if len(documents) == 1:
        return _split_lines(documents[0], every)
    packages = sorted({document.package for document in documents})
    chosen = {p for p in packages if p not in protected and _name_hash(p) % every == 0}
    if not chosen or len(chosen) == len(packages):
        chosen = {packages[-1]}
    if len(packages) == 1:
        return tuple(documents[:-1]), tuple(documents[-1:])
    train = tuple(document for document in documents if document.package not in chosen)
    heldout = tuple(document for document in documents if document.package in chosen)
    return train, heldout


def _split_lines(
    document: Document, every: int
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    lines = document.text.splitlines(keepends=True)
    if len(lines) < 2:
        raise BadInput(
            f"data.source: {document.name} is one line, so no line is left to hold out for "
            "validation: give a text of several lines or a folder"
        )
    cut = len(lines) - max(1, len(lines) // every)
    train = Document(f"{document.name}#train", "".join(lines[:cut]))
    heldout = Document(f"{document.name}#heldout", "".join(lines[cut:]))
    return (train,), (heldout,)


def _name_bytes(name: str) -> bytes:
    """Encode a path as the file system gave it, which may not be UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(_name_bytes(name)).digest(), "big")
