"""Texts for the tests of data preparation, made from seeds."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path

import zstandard

WORDS = [f"{start}{end}" for start in "bdfgklmnprstvz" for end in ("ale", "io", "una", "eth", "ox")]


def prose(seed: int, words: int) -> str:
    """Return so many words in lines of about ten; seeds give texts without common passages."""
    rng = random.Random(seed)
    chosen = [f"{rng.choice(WORDS)}{rng.randrange(100)}" for _ in range(words)]
    lines = [" ".join(chosen[i : i + 10]) for i in range(0, words, 10)]
    return "\n".join(lines) + "\n"


def write(folder: Path, files: dict[str, str]) -> None:
    """Write text files, byte for byte, with the folders that they are in."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))


def jsonl(records: Iterable[object]) -> str:
    """Return records as JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def pack(text: str, path: Path) -> None:
    """Write a text as the file's suffix says: plain, .gz or .zst."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    elif path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)


def write_parquet(path: Path, columns: dict[str, list[object]], rows_a_group: int = 4) -> None:
    """Write a Parquet file with several row groups."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_a_group)
