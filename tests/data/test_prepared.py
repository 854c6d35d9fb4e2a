"""Opening prepared text: what is damaged or missing is named, nothing is guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.data.texts import prose, write
from ziphius.checkpoint.files import write_manifest
from ziphius.config.data import DataConfig, SourceConfig
from ziphius.config.errors import BadInput
from ziphius.config.recipe import load_recipe
from ziphius.data.documents import Document
from ziphius.data.engine import LocalEngine
from ziphius.data.prepare import prepare
from ziphius.data.prepared import heldout_line, is_prepared, open_prepared, prepared_folder
from ziphius.data.removed import Removed


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write(folder / "text", {f"p{number}/m.py": prose(number, 60) for number in range(12)})
    small = ["model.vocab_size=400", "tokenizer.vocab_size=400"]
    recipe = load_recipe("tiny", [f"data.source={folder / 'text'}", *small])
    with LocalEngine() as engine:
        prepare(recipe, folder / "out", engine, shard_tokens=1000)
    return folder / "out"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(original, tmp_path / "out"))


def refusal(folder: Path) -> str:
    with pytest.raises(BadInput) as error:
        open_prepared(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


FILES = [
    "prepared.json", "tokenizer.json", "heldout.jsonl", "removed.jsonl",
    "source-00/tokens-00001.npy", "source-00/lengths.npy", "source-00/keys.npy",
    "source-00/projects.npy",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_found_in_every_file(folder: Path, name: str) -> None:
    open_prepared(folder)
    data = bytearray((folder / name).read_bytes()) or bytearray(b"x")
    data[-1] ^= 1
    (folder / name).write_bytes(bytes(data))
    assert name in refusal(folder)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refusal(folder)


def test_sizes_are_compared_even_without_checksums(folder: Path) -> None:
    shard = folder / "source-00" / "tokens-00000.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    open_prepared(folder, checksums=False)
    shard.write_bytes(bytes(data[:-2]))
    with pytest.raises(BadInput, match=r"tokens-00000.npy has \d+ bytes instead of"):
        open_prepared(folder, checksums=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda described: described.update(format=2), "is of format 2, not 1"),
        (lambda described: described.pop("sources"), r"is damaged \(KeyError"),
        (lambda described: described.update(sources=3), r"is damaged \(TypeError"),
        (lambda described: described["sources"][0]["shards"].pop(), "do not belong together"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(folder: Path, change, said: str) -> None:  # type: ignore[no-untyped-def]
    """Also where the manifest agrees: someone wrote it anew."""
    described = json.loads((folder / "prepared.json").read_text())
    change(described)
    (folder / "prepared.json").write_text(json.dumps(described))
    write_manifest(folder)
    with pytest.raises(BadInput, match=said):
        open_prepared(folder)


def test_another_folder_is_no_prepared_text(tmp_path: Path) -> None:
    assert "give a folder that 'ziphius prepare' made" in refusal(tmp_path)
    assert not is_prepared(tmp_path)


def test_a_recipe_may_name_prepared_text_as_its_only_source(folder: Path, tmp_path: Path) -> None:
    assert prepared_folder(DataConfig(source=str(folder))) == folder
    entry = SourceConfig(path=str(folder))
    assert prepared_folder(DataConfig(sources=(entry,))) == folder
    assert prepared_folder(DataConfig(sources=(entry, SourceConfig(path="stdlib")))) is None
    assert prepared_folder(DataConfig(source=str(tmp_path))) is None
    assert prepared_folder(DataConfig()) is None


def test_names_that_are_no_utf8_survive_a_line() -> None:
    document = Document("a\udcff\n", "text ☃\r\n", 3, True)
    line = heldout_line(document)
    assert line.isascii()
    assert line.count(b"\n") == 1
    assert Document(**json.loads(line)) == document


def test_removed_lines_leave_out_what_is_not_known() -> None:
    from ziphius.data.prepared import removed_line

    line = removed_line(Removed(0, "a", "empty", 0))
    assert json.loads(line) == {"source": 0, "name": "a", "reason": "empty", "bytes": 0}
