"""Files of JSON lines: an object a line, each with where it stands for messages of errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ziphius.config.errors import BadInput, in_one_line

# What a line holds, and its file and number.
Objects = list[tuple[dict[str, Any], str]]


def read_objects(sources: Sequence[Path]) -> tuple[Objects, str]:
    """Return the objects of files, without empty lines, and a digest of the files' bytes.

    Raises BadInput that names the file and the line for what is no object.
    """
    digest = hashlib.sha256()
    found: Objects = []
    for source in sources:
        try:
            data = source.read_bytes()
        except OSError as error:
            raise BadInput(f"{source}: cannot be read: {error.strerror}") from None
        digest.update(hashlib.sha256(data).digest())
        for number, line in enumerate(data.splitlines(), start=1):
            if line.strip():
                where = f"{source}: line {number}"
                found.append((_object(line, where), where))
    return found, digest.hexdigest()


def sources_of(setting: str, table: str) -> list[Path]:
    """Return the files that a table's ``source`` names. Raises BadInput where it names none."""
    if not setting.strip():
        raise BadInput(
            f"{table}.source: no records: give a file of JSON lines by --set {table}.source=FILE"
        )
    return [Path(name.strip()) for name in setting.split(",")]


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: is no JSON: {in_one_line(error)}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{where}: is no JSON object: give an object a line")
    return value
