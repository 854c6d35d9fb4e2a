"""The corpus: what is read, that the held-out part is whole packages, and that it never moves."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.config.data import DataConfig
from ziphius.config.errors import BadInput
from ziphius.data.corpus import Corpus, Document, read_corpus


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return read_corpus(DataConfig())


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


def read(source: Path, every: int = 20) -> Corpus:
    return read_corpus(DataConfig(source=str(source), holdout_every=every))


def names(documents: tuple[Document, ...]) -> list[str]:
    return [document.name for document in documents]


def held_by_rule(package: str, every: int) -> bool:
    return int(hashlib.sha256(package.encode()).hexdigest(), 16) % every == 0


def test_stdlib_documents_are_the_library_without_its_tests(stdlib: Corpus) -> None:
    found = {*names(stdlib.train), *names(stdlib.heldout)}
    assert {"ast.py", "asyncio/base_events.py", "email/message.py", "enum.py"} <= found
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not [name for name in found if skipped & set(name.split("/"))]
    # These name folders of the machine that built the interpreter.
    assert not [name for name in found if name.startswith(("_sysconfigdata", "config-"))]


def test_stdlib_texts_are_the_bytes_of_the_files(stdlib: Corpus) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    for document in (*stdlib.train[::40], *stdlib.heldout[::10]):
        assert document.text.encode() == (root / document.name).read_bytes()


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
    corpus = read_corpus(DataConfig(holdout_every=every))
    share = corpus.heldout_bytes / (corpus.heldout_bytes + corpus.train_bytes)
    assert 0.5 / every < share < 2 / every


def test_reading_twice_gives_the_same(stdlib: Corpus) -> None:
    again = read_corpus(DataConfig())
    assert (again, again.sha256) == (stdlib, stdlib.sha256)
    assert names(stdlib.train) == sorted(names(stdlib.train))


def test_folder_reads_text_files_only_and_counts_what_is_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, {"a/one.txt": "1", "a/b/two.md": "2", "three.rst": "3\r\n", "four.py": "４"})
    write(tmp_path, {"picture.png": "no", ".git/notes.txt": "no", "empty.txt": ""})
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    corpus = read(tmp_path)
    found = {document.name: document.text for document in (*corpus.train, *corpus.heldout)}
    assert found == {"a/one.txt": "1", "a/b/two.md": "2", "three.rst": "3\r\n", "four.py": "４"}
    assert corpus.skipped == 1
    assert corpus.train_bytes + corpus.heldout_bytes == 1 + 1 + 3 + 3


def test_folder_holds_out_the_packages_that_the_hash_of_their_name_picks(tmp_path: Path) -> None:
    packages = [f"package{i}" for i in range(40)]
    write(tmp_path, {f"{p}/{name}.txt": p for p in packages for name in ("x", "y")})
    corpus = read(tmp_path, every=4)
    expected = sorted(p for p in packages if held_by_rule(p, 4))
    assert 0 < len(expected) < 40
    assert list(corpus.heldout_packages) == expected
    assert len(corpus.heldout) == 2 * len(expected)
    assert len(corpus.train) == 2 * (40 - len(expected))


def test_adding_a_package_moves_no_other(tmp_path: Path) -> None:
    write(tmp_path, {f"package{i}/x.txt": "x" for i in range(40)})
    before = set(read(tmp_path, every=4).heldout_packages)
    write(tmp_path, {f"another{i}/x.txt": "x" for i in range(40)})
    after = set(read(tmp_path, every=4).heldout_packages)
    assert {name for name in after if name.startswith("package")} == before


def test_when_the_rule_picks_none_the_last_package_is_held_out(tmp_path: Path) -> None:
    unpicked = [p for p in map(str, range(1000)) if not held_by_rule(p, 2)][:3]
    write(tmp_path, {f"{p}/{name}.txt": p for p in unpicked for name in ("x", "y")})
    assert read(tmp_path, every=2).heldout_packages == (max(unpicked),)


def test_when_the_rule_picks_all_the_last_package_is_held_out(tmp_path: Path) -> None:
    picked = [p for p in map(str, range(1000)) if held_by_rule(p, 2)][:3]
    write(tmp_path, {f"{p}.txt": p for p in picked})
    corpus = read(tmp_path, every=2)
    assert corpus.heldout_packages == (max(picked),)
    assert len(corpus.train) == 2


def test_of_one_package_the_last_document_is_held_out(tmp_path: Path) -> None:
    write(tmp_path, {"only/a.txt": "a", "only/b.txt": "b", "only/c.txt": "c"})
    corpus = read(tmp_path)
    assert (names(corpus.train), names(corpus.heldout)) == (
        ["only/a.txt", "only/b.txt"],
        ["only/c.txt"],
    )


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_single_text_is_split_by_lines(tmp_path: Path, as_folder: bool) -> None:
    lines = [f"line {i}\r\n" for i in range(103)]
    write(tmp_path, {"book.txt": "".join(lines)})
    corpus = read(tmp_path if as_folder else tmp_path / "book.txt", every=10)
    assert [document.text for document in corpus.train] == ["".join(lines[:93])]
    assert [document.text for document in corpus.heldout] == ["".join(lines[93:])]
    assert {d.package for d in (*corpus.train, *corpus.heldout)} == {"book"}


def test_package_is_the_first_folder_or_the_module() -> None:
    documents = ["email/mime/base.py", "enum.py", "v1.2/notes.md"]
    assert [Document(n, "").package for n in documents] == ["email", "enum", "v1.2"]


def test_sha256_sees_names_bytes_and_where_one_ends() -> None:
    def digest(*pairs: tuple[str, str]) -> str:
        return Corpus(tuple(Document(*pair) for pair in pairs), (), 0, "").sha256

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
    assert Corpus(documents[1:], documents[:1], 0, "").sha256 == Corpus(documents, (), 0, "").sha256


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({}, "missing", "no such file or folder"),
        ({"image.png": "x"}, ".", "no UTF-8 text found"),
        ({"line.txt": "one line only"}, "line.txt", "is one line"),
    ],
)
def test_bad_sources_are_told_in_one_line(
    tmp_path: Path, files: dict[str, str], source: str, message: str
) -> None:
    write(tmp_path, files)
    with pytest.raises(BadInput, match=message) as error:
        read(tmp_path / source)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\n\xff")
    with pytest.raises(BadInput, match="1 files are not UTF-8"):
        read(tmp_path / "latin.txt")
