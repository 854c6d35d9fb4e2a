"""A mixture to prepare, and what the tests of the engines compare."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tests.data.texts import jsonl, pack, prose, write
from ziphius.config.recipe import Recipe, load_recipe
from ziphius.data.engine import LocalEngine
from ziphius.data.prepare import prepare
from ziphius.data.prepared import Prepared


def recipe(*overrides: str) -> Recipe:
    return load_recipe("tiny", ["model.vocab_size=400", "tokenizer.vocab_size=400", *overrides])


def make_mixture(folder: Path) -> str:
    """Write a folder and a file of records, with something of everything to remove.

    Returns the setting that names them.
    """
    files = {f"p{number}/m.py": prose(number, 60) for number in range(12)}
    files |= {"p0/copy.py": prose(3, 60), "p1/near.py": "a header of\nsome words\n" + prose(4, 60)}
    files |= {"empty.txt": "", "nul.txt": "a\0b"}
    files |= {"windows.txt": prose(50, 20).replace("\n", "\r\n")}
    write(folder / "code", files)
    (folder / "code" / "latin.txt").write_bytes(b"\xff")
    (folder / "code" / "caf\udce9.py").write_text("a name that is no UTF-8\n" * 3)
    rows = [{"body": prose(n, 60)} for n in range(11, 41)]
    pack(jsonl(rows), folder / "rows.jsonl.gz")
    entries = [
        f'{{path = "{folder / "code"}", weight = 3.0}}',
        f'{{path = "{folder / "rows.jsonl.gz"}", text_field = "body"}}',
    ]
    return f"data.sources=[{', '.join(entries)}]"


def run(recipe: Recipe, out: Path, workers: int = 1, **options: Any) -> Prepared:
    with LocalEngine(workers) as local:
        return prepare(recipe, out, local, **options)


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
