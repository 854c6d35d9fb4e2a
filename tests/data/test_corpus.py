"""The corpus in memory: what is read, what is left out, what is held out, and that it stays so."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.texts import jsonl, pack, prose, write, write_parquet
from ziphius.config.data import DataConfig, SourceConfig
from ziphius.config.errors import BadInput
from ziphius.data.corpus import Corpus, Document, read_corpus


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return read_corpus(DataConfig())


def read(source: Path, every: int = 20, **settings: object) -> Corpus:
    return read_corpus(DataConfig(source=str(source), holdout_every=every, **settings))


def names(documents: tuple[Document, ...]) -> list[str]:
    return [document.name for document in documents]


def texts(corpus: Corpus) -> dict[str, str]:
    return {document.name: document.text for document in (*corpus.train, *corpus.heldout)}


def refusal(source: Path | str, **settings: object) -> str:
    with pytest.raises(BadInput) as error:
        read_corpus(DataConfig(source=str(source), **settings))
    assert "\n" not in str(error.value)
    return str(error.value)


# The standard library


def test_stdlib_texts_are_the_bytes_of_the_files(stdlib: Corpus) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    for document in (*stdlib.train[::40], *stdlib.heldout[::10]):
        assert document.text.encode() == (root / document.name).read_bytes()
    assert "standard library of" in stdlib.description


def test_stdlib_loses_only_copies_and_empty_files(stdlib: Corpus) -> None:
    reasons = {count.reason for count in stdlib.removed_counts}
    assert reasons <= {"empty", "exact duplicate", "near duplicate"}
    near = [removed for removed in stdlib.removed if removed.reason == "near duplicate"]
    # Code pages that differ in a few characters: tables, no programs and no prose.
    assert near
    assert {removed.name.split("/")[0] for removed in near} == {"encodings"}
    assert sum(removed.bytes for removed in stdlib.removed) < 0.05 * stdlib.train_bytes
    kept = texts(stdlib)
    assert all(removed.copy_of in kept for removed in near)
    assert not {removed.name for removed in stdlib.removed} & set(kept)


def test_stdlib_holds_out_whole_packages_of_a_sensible_size(stdlib: Corpus) -> None:
    trained = {document.package for document in stdlib.train}
    assert trained.isdisjoint(stdlib.heldout_packages)
    assert len(stdlib.heldout_packages) >= 5
    assert 0.02 < stdlib.heldout_bytes / (stdlib.heldout_bytes + stdlib.train_bytes) < 0.08
    # By name alone: these are modules of every Python since 3.11.
    assert {"ctypes", "enum", "mailbox", "tarfile"} <= set(stdlib.heldout_packages)
    assert {"encodings", "pydoc_data", "ast"} <= trained


@pytest.mark.parametrize("every", [10, 50])
def test_stdlib_share_follows_the_setting(every: int) -> None:
    corpus = read_corpus(DataConfig(holdout_every=every, deduplicate="exact"))
    share = corpus.heldout_bytes / (corpus.heldout_bytes + corpus.train_bytes)
    assert 0.5 / every < share < 2 / every


def test_reading_twice_gives_the_same(stdlib: Corpus) -> None:
    first, again = (read_corpus(DataConfig(deduplicate="exact")) for _ in range(2))
    assert (again, again.sha256) == (first, first.sha256)
    assert first.sha256 != stdlib.sha256
    assert names(stdlib.train) == sorted(names(stdlib.train))


# Folders


def test_a_folder_is_read_cleaned_and_counted(tmp_path: Path) -> None:
    write(tmp_path, {"a/one.txt": "1", "a/b/two.md": "2", "three.rst": "3\r\n", "four.py": "４"})
    write(tmp_path, {"picture.png": "no", ".git/notes.txt": "no", "empty.txt": ""})
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    corpus = read(tmp_path)
    assert texts(corpus) == {
        "a/one.txt": "1",
        "a/b/two.md": "2",
        "three.rst": "3\n",
        "four.py": "４",
    }
    assert corpus.skipped == 1
    assert corpus.train_bytes + corpus.heldout_bytes == 1 + 1 + 2 + 3
    assert [(count.reason, count.examples) for count in corpus.removed_counts] == [
        ("not UTF-8", ("latin.txt",)),
        ("empty", ("empty.txt",)),
    ]
    assert texts(read(tmp_path, clean=False))["three.rst"] == "3\r\n"


def test_files_and_records_of_a_folder_are_one_corpus(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": prose(1, 20)})
    pack(jsonl({"text": prose(n, 20)} for n in (2, 3)), tmp_path / "rows.jsonl.gz")
    write_parquet(tmp_path / "table.parquet", {"text": [prose(4, 20), prose(3, 20)]})
    corpus = read(tmp_path)
    assert set(texts(corpus)) == {
        "a.txt", "rows.jsonl.gz#1", "rows.jsonl.gz#2", "table.parquet#1"
    }  # fmt: skip
    (copy,) = corpus.removed
    assert (copy.name, copy.copy_of) == ("table.parquet#2", "rows.jsonl.gz#2")
    assert (copy.reason, copy.similarity) == ("exact duplicate", 1.0)


def test_adding_a_package_moves_no_other(tmp_path: Path) -> None:
    write(tmp_path, {f"package{i}/x.txt": f"x{i}" for i in range(40)})
    before = set(read(tmp_path, every=4).heldout_packages)
    write(tmp_path, {f"another{i}/x.txt": f"y{i}" for i in range(40)})
    after = set(read(tmp_path, every=4).heldout_packages)
    assert before
    assert {name for name in after if name.startswith("package")} == before


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_single_text_is_split_by_lines(tmp_path: Path, as_folder: bool) -> None:
    lines = [f"line {i}\n" for i in range(103)]
    write(tmp_path, {"book.txt": "".join(lines)})
    corpus = read(tmp_path if as_folder else tmp_path / "book.txt", every=10)
    assert [document.text for document in corpus.train] == ["".join(lines[:93])]
    assert [document.text for document in corpus.heldout] == ["".join(lines[93:])]
    assert {d.package for d in (*corpus.train, *corpus.heldout)} == {"book"}


def test_progress_is_told_until_all_is_read(tmp_path: Path) -> None:
    write(tmp_path, {f"{n}.txt": prose(n, 50) for n in range(150)})
    told: list[tuple[str, int, int | None]] = []
    read_corpus(DataConfig(source=str(tmp_path)), lambda *now: told.append(now))
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    done = [now[1] for now in told]
    assert done == sorted(done)
    assert len(done) > 1
    assert told[-1] == ("reading", total, total)


# Mixtures


def mixture(tmp_path: Path, **settings: object) -> Corpus:
    """Two sources with a text in common."""
    write(tmp_path / "code", {f"p{n}/m.py": prose(n, 40) for n in range(12)})
    rows = [{"body": prose(n, 40)} for n in range(11, 60)]
    write(tmp_path, {"rows.jsonl": jsonl(rows)})
    sources = (
        SourceConfig(path=str(tmp_path / "code"), weight=3),
        SourceConfig(path=str(tmp_path / "rows.jsonl"), text_field="body"),
    )
    return read_corpus(DataConfig(sources=sources, holdout_every=4, **settings))


def test_every_source_of_a_mixture_keeps_its_own(tmp_path: Path) -> None:
    corpus = mixture(tmp_path)
    (code, code_weight), (rows, rows_weight) = corpus.train_by_source
    assert (code_weight, rows_weight) == (3, 1)
    assert all(document.name.startswith("p") and not document.is_record for document in code)
    assert all(document.name.startswith("rows.jsonl#") for document in rows)
    assert len(code) + len(rows) == len(corpus.train)
    assert {document.source for document in corpus.heldout} == {0, 1}
    assert len(corpus.train) + len(corpus.heldout) == 12 + 49 - 1
    assert all(name.startswith("p") for name in corpus.heldout_packages)


def test_a_copy_in_another_source_goes(tmp_path: Path) -> None:
    (copy,) = mixture(tmp_path).removed
    assert (copy.source, copy.name) == (1, "rows.jsonl#1")
    assert (copy.copy_of_source, copy.copy_of) == (0, "p11/m.py")


def test_a_bound_keeps_most_of_a_large_source(tmp_path: Path) -> None:
    corpus = mixture(tmp_path, holdout_bytes=900)
    for source in (0, 1):
        held = sum(document.size for document in corpus.heldout if document.source == source)
        assert 0 < held <= 900


def test_of_a_source_that_teaches_nothing_is_held_out(tmp_path: Path) -> None:
    write(tmp_path, {f"b/{n}.txt": prose(n, 40) for n in range(9)})
    write(tmp_path, {"rows.jsonl": jsonl([{"text": prose(n, 40)} for n in range(20, 60)])})
    taught = SourceConfig(path=str(tmp_path / "rows.jsonl"), holdout=False)
    corpus = read_corpus(
        DataConfig(sources=(taught, SourceConfig(path=str(tmp_path / "b"))), holdout_every=4)
    )
    assert {document.source for document in corpus.heldout} == {1}
    assert sum(document.source == 0 for document in corpus.train) == 40


def test_something_has_to_be_held_out() -> None:
    with pytest.raises(ValueError, match="all have holdout = false"):
        DataConfig(sources=(SourceConfig(path="a", holdout=False),))


# The digest


def test_sha256_sees_names_bytes_and_where_one_ends() -> None:
    def digest(*pairs: tuple[str, str]) -> str:
        return Corpus(tuple(Document(*pair) for pair in pairs), (), "").sha256

    base = digest(("a", "x"), ("b", "y"))
    assert base == digest(("b", "y"), ("a", "x"))
    others = [
        digest(("a", "x"), ("b", "z")),
        digest(("a", "x"), ("c", "y")),
        digest(("ax", "by")),
        digest(("a", "x")),
    ]
    assert len({base, *others}) == 5


@given(parts=st.lists(st.text("ab", min_size=1), min_size=1, max_size=6))
def test_sha256_does_not_depend_on_what_is_held_out(parts: list[str]) -> None:
    documents = tuple(Document(f"{i}.txt", part) for i, part in enumerate(parts))
    assert Corpus(documents[1:], documents[:1], "").sha256 == Corpus(documents, (), "").sha256


def test_sha256_is_what_the_docstrings_say() -> None:
    expected = hashlib.sha256()
    for source, name, text in ((0, b"a\xff", b"x"), (2, b"b", "é".encode())):
        expected.update(source.to_bytes(8, "little") + len(name).to_bytes(8, "little"))
        expected.update(name + hashlib.sha256(text).digest())
    corpus = Corpus((Document("b", "é", 2),), (Document("a\udcff", "x"),), "")
    assert corpus.sha256 == expected.hexdigest()


# What cannot be used


def test_a_source_without_text_says_what_removed_it(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "", "b.txt": "\0", "c.txt": " \n"})
    (tmp_path / "d.txt").write_bytes(b"\xff")
    said = refusal(tmp_path)
    assert "no text left to train on: 1 not UTF-8, 1 empty, 1 binary, 1 too short" in said
    write(tmp_path / "e", {"x.jsonl": ""})
    assert "no text left to train on: nothing removed" in refusal(tmp_path / "e")
    assert "too short" in refusal("stdlib", min_characters=10**9)


def test_a_source_of_copies_only_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a/x.txt": prose(1, 50), "b/x.txt": prose(1, 50)})
    sources = tuple(SourceConfig(path=str(tmp_path / name)) for name in "ab")
    with pytest.raises(BadInput, match=r"data.sources\[1\].*: no text left.*1 exact duplicate"):
        read_corpus(DataConfig(sources=sources))


def test_a_single_line_leaves_nothing_to_hold_out(tmp_path: Path) -> None:
    write(tmp_path, {"line.txt": "one line only"})
    assert "line.txt is one line" in refusal(tmp_path / "line.txt")


def test_beside_another_source_a_single_line_trains(tmp_path: Path) -> None:
    write(tmp_path, {"line.txt": "one line only", "b/x.txt": "x\n", "b/y.txt": "y\n"})
    sources = tuple(SourceConfig(path=str(tmp_path / name)) for name in ("line.txt", "b"))
    corpus = read_corpus(DataConfig(sources=sources))
    assert [(d.source, d.name) for d in corpus.train] == [(0, "line.txt"), (1, "x.txt")]
    assert names(corpus.heldout) == ["y.txt"]


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "fine\n", "b.jsonl": json.dumps({"text": "fine"}) + "\n{\n"})
    assert f"{tmp_path / 'b.jsonl'}: line 2: is not valid JSON" in refusal(tmp_path)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path, {"a.txt": "fine\n", "b.txt": "secret\n"})
    original = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert f"{tmp_path / 'b.txt'}: cannot be read: Permission denied" in refusal(tmp_path)
