"""Names, sizes and the digest of a whole corpus."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from ziphius.data.documents import Document, digest_of_texts, name_hash, package_of


def test_package_is_the_first_folder_or_the_module() -> None:
    names = ["email/mime/base.py", "enum.py", "v1.2/notes.md", ".hidden", ""]
    assert [package_of(name) for name in names] == ["email", "enum", "v1.2", ".hidden", ""]
    assert [Document(name, "").package for name in names] == [package_of(name) for name in names]


def test_size_and_digest_are_of_the_utf8_bytes() -> None:
    document = Document("a", "é☃")
    assert document.size == 5
    assert document.digest == hashlib.sha256("é☃".encode()).digest()


def test_a_name_that_is_no_utf8_has_a_hash() -> None:
    assert name_hash("a\udcff") == int(hashlib.sha256(b"a\xff").hexdigest(), 16)


texts = st.lists(
    st.tuples(st.integers(0, 3), st.text("ab/", max_size=4), st.binary(min_size=32, max_size=32)),
    max_size=6,
)


@given(texts, st.randoms())
def test_the_digest_does_not_depend_on_the_order(entries: list, shuffle) -> None:  # type: ignore[no-untyped-def, type-arg]
    shuffled = entries.copy()
    shuffle.shuffle(shuffled)
    assert digest_of_texts(shuffled) == digest_of_texts(entries)


def test_the_digest_sees_sources_names_texts_and_where_one_ends() -> None:
    def entry(source: int, name: str, text: str) -> tuple[int, str, bytes]:
        return source, name, hashlib.sha256(text.encode()).digest()

    corpora = [
        [entry(0, "a", "x"), entry(0, "b", "y")],
        [entry(0, "a", "x"), entry(1, "b", "y")],
        [entry(0, "a", "x"), entry(0, "b", "z")],
        [entry(0, "a", "x"), entry(0, "c", "y")],
        [entry(0, "a", "x")],
        [],
    ]
    assert len({digest_of_texts(corpus) for corpus in corpora}) == len(corpora)
