"""Where the text comes from: the sources of a mixture, as pieces that readers read."""

from __future__ import annotations

import os
import platform
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ziphius.config.data import DataConfig, SourceConfig
from ziphius.config.errors import BadInput
from ziphius.data.prepared import is_prepared
from ziphius.data.readers import Kind, Piece, split_hub_path

STDLIB = "stdlib"
HUB = "hf:"

# Prose, then programs.
TEXT_SUFFIXES = (
    *(".md", ".rst", ".tex", ".txt"),
    *(".c", ".cc", ".cpp", ".cs", ".cu", ".css", ".go", ".h", ".hpp", ".html", ".java", ".jl"),
    *(".js", ".kt", ".lua", ".php", ".pl", ".py", ".r", ".rb", ".rs", ".scala", ".sh", ".sql"),
    *(".swift", ".toml", ".ts", ".yaml", ".yml"),
)
JSONL_SUFFIXES = (
    *(name + packed for name in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst")),
    *(".json.gz", ".json.zst"),
)
PARQUET_SUFFIXES = (".parquet",)

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

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One source of the mixture. ``protected`` packages are never held out."""

    label: str
    config: SourceConfig
    description: str
    pieces: tuple[Piece, ...]
    protected: frozenset[str] = frozenset()

    @property
    def bytes(self) -> int | None:
        """Bytes of all pieces as they are on the disk; None for a source that is elsewhere."""
        if any(piece.kind == "hub" for piece in self.pieces):
            return None
        return sum(piece.bytes for piece in self.pieces)


def open_sources(config: DataConfig) -> tuple[Source, ...]:
    """List what is to be read, in the order of names. Nothing is read yet.

    The source ``stdlib`` is every ``.py`` file of the running interpreter's standard library but
    its tests. A folder gives every file of text, JSON lines and Parquet below it; left out are
    folders whose name begins with a dot and those that ``ziphius prepare`` made. A file is one
    text, or its records.

    Raises BadInput for sources that are missing, without files, or named twice.
    """
    sources = tuple(
        _open(index, entry, f"data.sources[{index}]" if config.sources else "data.source")
        for index, entry in enumerate(config.mixture)
    )
    seen: dict[tuple[str, str], str] = {}
    for source in sources:
        path = source.config.path
        is_file = path != STDLIB and not path.startswith(HUB)
        identity = os.path.realpath(Path(path).expanduser()) if is_file else path
        other = seen.setdefault((identity, source.config.text_field), source.label)
        if other != source.label:
            raise BadInput(
                f"{other} and {source.label} are the same source, '{path}': remove one of them, "
                "and add its weight to the other's"
            )
    return sources


def total_bytes(sources: Iterable[Source]) -> int | None:
    """Bytes of all sources as they are on the disk; None if one of them is elsewhere."""
    total = 0
    for source in sources:
        if source.bytes is None:
            return None
        total += source.bytes
    return total


def describe_sources(sources: Iterable[Source]) -> str:
    """Say what the text is, in a few words."""
    return "; ".join(source.description for source in sources)


def _open(index: int, config: SourceConfig, label: str) -> Source:
    if config.path == STDLIB:
        return _open_stdlib(index, config, label)
    if config.path.startswith(HUB):
        return _open_hub(index, config, label)
    root = Path(config.path).expanduser()
    if root.is_dir():
        return _open_folder(index, config, label, root)
    if root.is_file():
        kind = _kind_of(root.name) or "text"
        piece = _piece(index, kind, root, root.name, config, is_alone=True)
        return Source(label, config, f"file {config.path}", (piece,))
    looks_like_hub = _HUB_NAME.fullmatch(config.path) and "/" in config.path
    hint = f"; for the Hugging Face hub write '{HUB}{config.path}'" if looks_like_hub else ""
    raise BadInput(
        f"{label} = '{config.path}': no such file or folder: give 'stdlib', a file or a folder"
        f"{hint}"
    )


def _open_stdlib(index: int, config: SourceConfig, label: str) -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    pieces = []
    for path in _walk(root, label, _STDLIB_SKIPPED_FOLDERS):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".py" and not name.startswith(_STDLIB_SKIPPED_PREFIXES):
            pieces.append(_piece(index, "text", path, name, config))
    description = f"standard library of {platform.python_implementation()} "
    description += platform.python_version()
    return Source(label, config, description, _by_name(pieces), _STDLIB_NEVER_HELD_OUT)


def _open_folder(index: int, config: SourceConfig, label: str, root: Path) -> Source:
    if is_prepared(root):
        raise BadInput(
            f"{label} = '{config.path}': was made by 'ziphius prepare' and is a whole mixture: "
            "train on it as the only source, or name the sources it was made of"
        )
    pieces = [
        _piece(index, kind, path, path.relative_to(root).as_posix(), config)
        for path in _walk(root, label)
        if (kind := _kind_of(path.name))
    ]
    if not pieces:
        raise BadInput(
            f"{label} = '{config.path}': no file to read in this folder: give one with text "
            "(.txt, .md, .py and other programs), JSON lines (.jsonl, .gz, .zst) or .parquet files"
        )
    return Source(label, config, f"folder {config.path}", _by_name(pieces))


def _open_hub(index: int, config: SourceConfig, label: str) -> Source:
    path = config.path.removeprefix(HUB)
    dataset, part, split = split_hub_path(path)
    if not _HUB_NAME.fullmatch(dataset):
        raise BadInput(
            f"{label} = '{config.path}': write {HUB}OWNER/NAME, with its parts "
            f"{HUB}OWNER/NAME:CONFIG@SPLIT"
        )
    name = f"{part}/{split}" if part else split
    piece = Piece(index, "hub", path, name, config.text_field, 0, is_alone=True)
    return Source(label, config, f"hub data set {path}", (piece,))


def _kind_of(name: str) -> Kind | None:
    kinds: tuple[tuple[tuple[str, ...], Kind], ...] = (
        (TEXT_SUFFIXES, "text"),
        (JSONL_SUFFIXES, "jsonl"),
        (PARQUET_SUFFIXES, "parquet"),
    )
    return next((kind for suffixes, kind in kinds if name.endswith(suffixes)), None)


def _walk(root: Path, label: str, skipped: frozenset[str] = frozenset()) -> Iterable[Path]:
    def stop(error: OSError) -> None:
        raise BadInput(f"{label}: {error.filename}: cannot be listed: {error.strerror}") from None

    for folder, subfolders, files in os.walk(root, onerror=stop):
        if is_prepared(Path(folder)):
            subfolders.clear()
            continue
        subfolders[:] = [n for n in subfolders if not n.startswith(".") and n not in skipped]
        # Pipes and links that lead nowhere are no files.
        yield from (path for name in files if (path := Path(folder, name)).is_file())


def _piece(
    index: int,
    kind: Kind,
    path: Path,
    name: str,
    config: SourceConfig,
    *,
    is_alone: bool = False,
) -> Piece:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    return Piece(index, kind, str(path), name, config.text_field, size, is_alone)


def _by_name(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    return tuple(sorted(pieces, key=lambda piece: piece.name))
