"""Sources: what is found where, in which order, and how a wrong one is refused."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

from tests.data.texts import jsonl, pack, write, write_parquet
from ziphius.config.data import DataConfig, SourceConfig
from ziphius.config.errors import BadInput
from ziphius.data.readers import read_piece
from ziphius.data.sources import Source, describe_sources, open_sources, total_bytes


def open_one(path: Path | str, **settings: object) -> Source:
    (source,) = open_sources(DataConfig(source=str(path), **settings))
    return source


def names(source: Source) -> list[str]:
    return [piece.name for piece in source.pieces]


def refusal(*paths: Path | str) -> str:
    entries = tuple(SourceConfig(path=str(path)) for path in paths)
    config = DataConfig(sources=entries) if len(entries) > 1 else DataConfig(source=str(paths[0]))
    with pytest.raises(BadInput) as error:
        open_sources(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_stdlib_is_the_library_without_its_tests() -> None:
    source = open_one("stdlib")
    found = set(names(source))
    assert {"ast.py", "asyncio/base_events.py", "email/message.py", "enum.py"} <= found
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not [name for name in found if skipped & set(name.split("/")[:-1])]
    # These name folders of the machine that built the interpreter.
    assert not [name for name in found if name.startswith(("_sysconfigdata", "config-"))]
    assert "standard library of" in source.description
    assert source.protected == {"encodings", "pydoc_data"}
    root = Path(sysconfig.get_path("stdlib"))
    assert source.bytes == sum((root / name).stat().st_size for name in found)


def test_a_folder_may_mix_texts_programs_and_records(tmp_path: Path) -> None:
    write(tmp_path, {"b/two.md": "2", "a.txt": "1", "b/main.rs": "fn", "picture.png": "no"})
    write(tmp_path, {".git/notes.txt": "no", "b/.x/y.txt": "no", "data.json": "{}"})
    pack(jsonl([{"text": "3"}]), tmp_path / "c" / "rows.jsonl.zst")
    write_parquet(tmp_path / "d.parquet", {"text": ["4"]})
    source = open_one(tmp_path)
    assert names(source) == ["a.txt", "b/main.rs", "b/two.md", "c/rows.jsonl.zst", "d.parquet"]
    texts = [raw.text for piece in source.pieces for raw in read_piece(piece)]
    assert texts == ["1", "fn", "2", "3", "4"]
    assert source.bytes == sum((tmp_path / name).stat().st_size for name in names(source))
    assert source.description == f"folder {tmp_path}"


def test_a_file_is_read_as_its_name_says(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": jsonl([{"body": "x"}]), "b.odd": "text"})
    (raw,) = read_piece(open_one(tmp_path / "a.jsonl", text_field="body").pieces[0])
    assert (raw.name, raw.text) == ("a.jsonl#1", "x")
    (raw,) = read_piece(open_one(tmp_path / "b.odd").pieces[0])
    assert (raw.name, raw.text) == ("b.odd", "text")


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "1"})
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "around").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    assert names(open_one(tmp_path)) == ["a.txt"]


def test_what_prepare_made_inside_a_folder_is_not_read_again(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "1", "z/b.txt": ""})
    write(tmp_path / "out", {"prepared.json": "{}", "heldout.jsonl": "", "inside/c.txt": ""})
    assert names(open_one(tmp_path)) == ["a.txt", "z/b.txt"]
    assert "only source" in refusal(tmp_path / "out")


def test_a_mixture_numbers_its_sources(tmp_path: Path) -> None:
    write(tmp_path, {"a/x.txt": "1", "b/y.txt": "2"})
    entries = (
        SourceConfig(path=str(tmp_path / "a"), weight=3),
        SourceConfig(path="hf:owner/name:en@test", text_field="body"),
        SourceConfig(path=str(tmp_path / "b")),
    )
    sources = open_sources(DataConfig(sources=entries))
    assert [[piece.source for piece in source.pieces] for source in sources] == [[0], [1], [2]]
    assert [source.config.weight for source in sources] == [3, 1, 1]
    assert sources[1].pieces[0].name == "en/test"
    assert sources[1].pieces[0].text_field == "body"
    assert describe_sources(sources[1:]) == (
        f"hub data set owner/name:en@test; folder {tmp_path / 'b'}"
    )
    assert total_bytes(sources) is None
    assert total_bytes((sources[0], sources[2])) == 2


def test_sources_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a/x.txt": "1", "b/x.png": ""})
    assert "no such file or folder" in refusal(tmp_path / "gone")
    assert "write 'hf:owner/name'" in refusal("owner/name")
    assert "hf:" not in refusal("owner/name/more")
    assert "write hf:OWNER/NAME" in refusal("hf:owner/na me")
    assert "no file to read" in refusal(tmp_path / "b")
    assert "data.sources[1]" in refusal(tmp_path / "a", tmp_path / "gone")


def test_a_source_that_is_named_twice_is_refused(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path, {"a/x.txt": "1"})
    monkeypatch.chdir(tmp_path)
    for other in (tmp_path / "a", "a/../a", "./a"):
        said = refusal("a", other)
        assert "data.sources[0] and data.sources[1] are the same source" in said
    assert "same source" in refusal("stdlib", "stdlib")
    fields = (SourceConfig(path="a", text_field=field) for field in ("question", "answer"))
    assert len(open_sources(DataConfig(sources=tuple(fields)))) == 2


def test_a_recipe_names_its_sources_one_way() -> None:
    with pytest.raises(ValueError, match=r"data\.sources is the whole mixture"):
        DataConfig(source="a", sources=(SourceConfig(path="b"),))
    assert [entry.path for entry in DataConfig(source="a").mixture] == ["a"]
