"""Readers: every format gives the same texts under stable names, and says where it is broken."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.texts import jsonl, pack, prose, write_parquet
from ziphius.config.errors import BadInput
from ziphius.data import readers
from ziphius.data.readers import Kind, Piece, Raw, optional, read_piece, split_hub_path

TEXTS = ["one\n", "zwei ☃\r\n", "", "4\u2028\n", "a\0b", prose(1, 400)]


def piece(path: Path, kind: Kind = "jsonl", field: str = "text", alone: bool = True) -> Piece:
    size = path.stat().st_size if path.exists() else 0
    return Piece(3, kind, str(path), path.name, field, size, alone)


def read(path: Path, kind: Kind = "jsonl", field: str = "text") -> list[Raw]:
    return list(read_piece(piece(path, kind, field)))


def refusal(path: Path, kind: Kind = "jsonl", field: str = "text") -> str:
    with pytest.raises(BadInput) as error:
        read(path, kind, field)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_of_records_gives_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, {"id": list(range(6)), "text": list(TEXTS)})
    else:
        pack(jsonl({"id": i, "text": text} for i, text in enumerate(TEXTS)), path)
    raws = read(path, "parquet" if name == "a.parquet" else "jsonl")
    assert [raw.text for raw in raws] == TEXTS
    assert [raw.name for raw in raws] == [f"{name}#{number}" for number in range(1, 7)]
    assert all(raw.is_record and raw.is_decoded and raw.source == 3 for raw in raws)
    assert sum(raw.cost for raw in raws) == path.stat().st_size


def test_a_text_file_is_one_text_of_its_very_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffé\r\n".encode())
    assert read(tmp_path / "a.txt", "text") == [Raw(3, "a.txt", False, 7, "\ufeffé\r\n")]


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "x"}\n  \n{"text": "y"}')
    assert [(raw.name, raw.text) for raw in read(tmp_path / "a.jsonl")] == [
        ("a.jsonl#2", "x"),
        ("a.jsonl#4", "y"),
    ]


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(0, 3000), max_size=6), cut=st.integers(1, 500))
def test_zst_frames_follow_one_another(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], cut: int
) -> None:
    """Independent of where frames, chunks and lines end."""
    path = tmp_path_factory.mktemp("zst") / "a.jsonl.zst"
    data = jsonl({"text": prose(size, size)} for size in sizes).encode()
    some = [data[i : i + cut * 20] for i in range(0, len(data), cut * 20)]
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in some))
    assert [raw.text for raw in read(path)] == [prose(size, size) for size in sizes]


def test_a_reader_holds_a_line_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(jsonl({"text": prose(i, 2000)} for i in range(100)), tmp_path / "a.jsonl.gz")
    lines: list[int] = []
    original = readers._text_of_line
    monkeypatch.setattr(readers, "_text_of_line", lambda *line: lines.append(1) or original(*line))
    stream = read_piece(piece(tmp_path / "a.jsonl.gz"))
    next(stream)
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"', "line 2: is not valid JSON"),
        (b"[1, 2]", "line 2: is no JSON object"),
        (b'{"text": "\xff"}', "line 2: is not UTF-8"),
        (b'{"body": "a", "id": 1}', "line 2: has no field 'text'"),
        (b'{"body": "a", "id": 1}', "its fields: 'body', 'id'"),
        (b'{"text": null}', "line 2: field 'text' is null, not a string"),
        (b'{"text": 5}', "is a number, not a string"),
        (b'{"text": ["a"]}', "is a list, not a string"),
        (b'{"text": {"a": 1}}', "is an object, not a string"),
        (b'{"text": true}', "is a truth value, not a string"),
        (b"[" * 100_000, "line 2: is not valid JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    assert said in refusal(tmp_path / "a.jsonl")


@pytest.mark.parametrize("kept", [10, 200, -1])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, name: str, kept: int) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, {"text": [prose(i, 300) for i in range(9)]})
    else:
        pack(jsonl({"text": prose(i, 300)} for i in range(9)), path)
    path.write_bytes(path.read_bytes()[:kept])
    said = refusal(path, "parquet" if name == "a.parquet" else "jsonl")
    assert "is damaged" in said or "cannot be read" in said


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_of_something_else_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is something else entirely, and long enough" * 9)
    said = refusal(tmp_path / name, "parquet" if name == "a.parquet" else "jsonl")
    assert "is damaged" in said


def test_changed_bytes_inside_are_found_where_the_format_has_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    pack(jsonl({"text": prose(i, 300)} for i in range(9)), path)
    data = bytearray(path.read_bytes())
    data[-8] ^= 1  # of the CRC
    path.write_bytes(bytes(data))
    assert "is damaged" in refusal(path)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"body": ["a"], "id": [1]}, "has no field 'text': set text_field to the text's; its"),
        ({"text": [1, 2]}, "field 'text' is int64, not a string"),
        ({"text": ["a", None]}, "row 2: field 'text' is null"),
    ],
)
def test_a_parquet_file_without_the_text_is_named(
    tmp_path: Path, columns: dict[str, list[Any]], said: str
) -> None:
    write_parquet(tmp_path / "a.parquet", columns)
    assert said in refusal(tmp_path / "a.parquet", "parquet")


def test_parquet_strings_may_be_large_or_a_dictionary_and_broken(tmp_path: Path) -> None:
    broken = pyarrow.array([b"ok", b"\xff\xfe"]).view(pyarrow.string())
    tables = {
        "large": pyarrow.array(["ok", "y"], pyarrow.large_string()),
        "dictionary": pyarrow.array(["ok", "y"]).dictionary_encode(),
        "view": pyarrow.array(["ok", "y"], pyarrow.string_view()),
        "broken": broken,
    }
    for name, column in tables.items():
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        raws = read(path, "parquet")
        assert raws[0].text == "ok"
        assert raws[1].is_decoded == (name != "broken")


def test_another_field_may_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": 3}\n')
    assert [raw.text for raw in read(tmp_path / "a.jsonl", field="body")] == ["x"]
    write_parquet(tmp_path / "a.parquet", {"body": ["x"], "text": [3]})
    assert [raw.text for raw in read(tmp_path / "a.parquet", "parquet", "body")] == ["x"]


def test_a_file_that_is_no_text_is_refused_alone_and_told_among_others(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\xff")
    assert "is not UTF-8 text (byte 2)" in refusal(path, "text")
    (raw,) = read_piece(piece(path, "text", alone=False))
    assert (raw.is_decoded, raw.text, raw.cost) == (False, "", 3)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_a_missing_file_is_named(tmp_path: Path, kind: Kind) -> None:
    assert "cannot be read" in refusal(tmp_path / "gone.jsonl", kind)


def test_gzip_written_elsewhere_is_read(tmp_path: Path) -> None:
    """Members follow one another, as ``cat a.gz b.gz`` makes them."""
    lines = [jsonl([{"text": text}]).encode() for text in ("a", "b")]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    assert [raw.text for raw in read(tmp_path / "a.jsonl.gz")] == ["a", "b"]


# The hub


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name@validation", ("owner/name", None, "validation")),
        ("owner/name:en@test[:10]", ("owner/name", "en", "test[:10]")),
    ],
)
def test_a_hub_path_has_a_name_a_configuration_and_a_split(
    path: str, parts: tuple[str, str | None, str]
) -> None:
    assert split_hub_path(path) == parts


def hub(path: str, field: str = "text") -> Piece:
    return Piece(0, "hub", path, "train", field, 0, True)


def test_rows_of_the_hub_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, config, options))
        rows = [{"id": i, "text": f"text {i}"} for i in range(3)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    raws = list(read_piece(hub("owner/name:en")))
    assert asked == [("owner/name", "en", {"split": "train", "streaming": True})]
    assert [(raw.name, raw.text) for raw in raws] == [
        (f"train#{i + 1}", f"text {i}") for i in range(3)
    ]
    with pytest.raises(BadInput, match="hf:owner/name: train: row 1: has no field 'body'"):
        list(read_piece(hub("owner/name", "body")))


def test_without_a_network_the_hub_is_refused_in_one_line() -> None:
    """The suite runs offline (conftest)."""
    with pytest.raises(BadInput, match="hf:ziphius/none: train: cannot be read: ") as error:
        list(read_piece(hub("ziphius/none")))
    assert "\n" not in str(error.value)


def test_a_library_that_is_not_installed_is_told_with_its_command() -> None:
    with pytest.raises(BadInput, match=r'needs no_such, .*pip install "ziphius\[data\]"'):
        optional("no_such.module", "data", "a.parquet")
