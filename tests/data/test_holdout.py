"""What is held out: packages and records by the hash of their name, bounded, never everything."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.data.documents import Document
from ziphius.data.holdout import choose_heldout, divide

PLENTY = 10**9


@dataclass(frozen=True)
class Fake:
    name: str
    size: int = 10
    is_record: bool = False


def hash_of(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def held(
    documents: list[Fake],
    every: int = 4,
    most: int = PLENTY,
    protected: frozenset[str] = frozenset(),
) -> list[str]:
    choice = choose_heldout(documents, every, most, protected)
    assert choice.divided is None
    return sorted(documents[place].name for place in choice.whole)


def records(count: int, size: int = 10) -> list[Fake]:
    return [Fake(f"rows.jsonl#{number}", size, True) for number in range(1, count + 1)]


def files(*packages: str, size: int = 10) -> list[Fake]:
    return [Fake(f"{package}/{name}.py", size) for package in packages for name in "xy"]


PACKAGES = [f"package{number}" for number in range(40)]


def test_whole_packages_are_held_out_that_the_hash_of_their_name_picks() -> None:
    expected = [f"{p}/{n}.py" for p in PACKAGES if hash_of(p) % 4 == 0 for n in "xy"]
    assert 0 < len(expected) < 80
    assert held(files(*PACKAGES)) == sorted(expected)


def test_single_records_are_held_out_that_the_hash_of_their_name_picks() -> None:
    expected = [record.name for record in records(200) if hash_of(record.name) % 20 == 0]
    assert 2 <= len(expected) <= 25
    assert held(records(200), every=20) == sorted(expected)


def test_files_and_records_of_one_folder_follow_their_own_rules() -> None:
    both = [*files(*PACKAGES), *records(200)]
    assert held(both) == sorted([*held(files(*PACKAGES)), *held(records(200))])


def test_a_large_source_gives_no_more_than_the_bound() -> None:
    documents = records(5000, size=1000)
    chosen = held(documents, every=20, most=30_000)
    picked = [record.name for record in documents if hash_of(record.name) % 20 == 0]
    # The ones with the smallest hashes: a larger bound only adds to them.
    assert chosen == sorted(sorted(picked, key=hash_of)[:30])
    packages = held(files(*PACKAGES, size=1000), every=4, most=6000)
    assert len(packages) == 6
    assert len({name.split("/")[0] for name in packages}) == 3


def test_more_documents_move_no_other_below_the_bound() -> None:
    before = set(held(files(*PACKAGES)))
    after = set(held(files(*PACKAGES, *(f"another{number}" for number in range(40)))))
    assert {name for name in after if name.startswith("package")} == before


def test_where_the_rule_picks_none_or_all_the_last_is_held_out() -> None:
    none = [p for p in map(str, range(1000)) if hash_of(p) % 2][:3]
    every = [p for p in map(str, range(1000)) if hash_of(p) % 2 == 0][:3]
    for packages in (none, every):
        assert held(files(*packages), every=2) == [f"{max(packages)}/{n}.py" for n in "xy"]
    protected = frozenset(PACKAGES[:-1])
    assert held(files(*PACKAGES), protected=protected) == [f"{PACKAGES[-1]}/{n}.py" for n in "xy"]


def test_protected_packages_train() -> None:
    picked = [p for p in PACKAGES if hash_of(p) % 4 == 0]
    chosen = held(files(*PACKAGES), protected=frozenset(picked[:1]))
    assert chosen == sorted(f"{p}/{n}.py" for p in picked[1:] for n in "xy")


def test_of_one_package_the_last_document_is_held_out() -> None:
    assert held([Fake("only/b.txt"), Fake("only/c.txt"), Fake("only/a.txt")]) == ["only/c.txt"]


def test_packages_beyond_the_bound_give_single_files() -> None:
    documents = [Fake(f"big{p}/{n}.py", 100) for p in range(3) for n in range(100)]
    chosen = held(documents, every=4, most=1000)
    assert len(chosen) == 10
    assert all(hash_of(name) % 4 == 0 for name in chosen)


def test_of_documents_beyond_the_bound_the_last_is_divided() -> None:
    for documents in ([Fake("a", 50), Fake("b", 50)], [Fake("a")]):
        choice = choose_heldout(documents, 2, 9)
        assert choice.whole == frozenset()
        assert choice.divided == len(documents) - 1
    assert choose_heldout([], 2, 9).divided is None


@given(
    st.lists(
        st.builds(Fake, st.text("ab/", min_size=1, max_size=5), st.integers(1, 50), st.booleans()),
        unique_by=lambda fake: fake.name,
        min_size=1,
    ),
    st.integers(2, 5),
    st.integers(1, 200),
    st.randoms(),
)
def test_something_is_held_out_within_the_bound_and_something_trains(
    documents: list[Fake], every: int, most: int, shuffle
) -> None:  # type: ignore[no-untyped-def]
    choice = choose_heldout(documents, every, most)
    assert bool(choice.whole) != (choice.divided is not None)
    assert len(choice.whole) < len(documents)
    assert sum(documents[place].size for place in choice.whole) <= most
    shuffled = documents.copy()
    shuffle.shuffle(shuffled)
    again = choose_heldout(shuffled, every, most)
    assert {shuffled[p] for p in again.whole} == {documents[p] for p in choice.whole}


@given(st.lists(st.sampled_from(["a\n", "bb\r\n", "ccc\n", "\n", "é\n"]), min_size=2, max_size=60),
       st.integers(2, 30), st.integers(1, 60))  # fmt: skip
def test_a_divided_text_is_all_there(lines: list[str], every: int, most: int) -> None:
    document = Document("a.txt", "".join(lines), 2, True)
    parts = divide(document, every, most)
    assert parts is not None
    first, last = parts
    assert first.text + last.text == document.text
    assert [part.name for part in parts] == ["a.txt#train", "a.txt#heldout"]
    assert all((part.source, part.is_record) == (2, True) for part in parts)
    count, wanted = len(last.text.splitlines(keepends=True)), max(1, len(lines) // every)
    assert 1 <= count <= wanted
    assert count == 1 or last.size <= most
    assert count == wanted or last.size + len(lines[-count - 1].encode()) > most


@pytest.mark.parametrize("text", ["one line", "one line\n", "\n"])
def test_a_single_line_is_not_divided(text: str) -> None:
    assert divide(Document("a", text), 2, 100) is None
