"""Writing a picture or a page so that nobody sees half of it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ziphius.config.errors import BadInput


def write_whole(path: Path, data: bytes, option: str = "--out") -> None:
    """Write a file that holds either its old content or all of ``data``; make its folder.

    Raises BadInput where that is not possible, with the ``option`` that names the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be written: {error.strerror}: name another file with {option}"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
