"""Text that teaches looking back: what is said again, and that nothing simpler gives it away."""

from __future__ import annotations

import numpy as np
import pytest

from ziphius.config.errors import BadInput
from ziphius.evaluation.needle import Fact, side_of
from ziphius.evaluation.recall import copy_documents, recall_documents

TEXTS = [
    "".join(f"value_{number} = compute({number})\n" for number in range(200)),
    "def read(path):\n    # open the file and read all of it\n    return file.read()\n\n" * 20,
]


def facts_of(text: str) -> list[Fact]:
    """Return the facts of a document in their order."""
    said = [line for line in text.split("\n") if line.startswith("Remember ")]
    pairs = (line.removeprefix("Remember ").removesuffix(".").split(" ", 1) for line in said)
    return [Fact(name, code) for name, code in pairs]


def test_recall_documents_have_nothing_of_the_tests() -> None:
    for text in recall_documents(TEXTS, 300, characters=(200, 2000), seed=0):
        for fact in facts_of(text):
            assert side_of(fact.name) == side_of(fact.code) == "train"


def test_a_name_has_one_code_in_a_document() -> None:
    sizes, real = [], 0
    for text in recall_documents(TEXTS, 200, characters=(300, 3000), seed=3, facts=5, most=20):
        said = facts_of(text)
        codes = {fact.name: fact.code for fact in said}
        assert [codes[fact.name] for fact in said] == [fact.code for fact in said]
        assert 3 <= len(codes) <= 5
        assert 9 <= len(said) <= 20
        assert len({fact.name for fact in said[: len(codes)]}) == len(codes), "each is said first"
        real += "value_" in text or "def read" in text
        sizes.append(len(text))
    # Short ones as often as long ones by ratio: half of them lie below the geometric mean.
    assert 0.35 < np.mean(np.array(sizes) < (300 * 3000) ** 0.5) < 0.65
    assert max(sizes) <= 3000 * 1.1
    assert real > 150, "facts lie in real text"


def test_no_distance_and_no_turn_tells_which_fact_comes_next() -> None:
    """The sentence so many before, or the one that was not said for longest: a third at best."""
    right = {"oldest": 0, **dict.fromkeys(range(1, 9), 0)}
    asked = 0
    for text in recall_documents(TEXTS, 400, characters=(300, 3000), seed=1):
        said = [fact.name for fact in facts_of(text)]
        for place in range(len(set(said)), len(said)):
            asked += 1
            for back in range(1, 9):
                right[back] += place >= back and said[place - back] == said[place]
            latest = {name: number for number, name in enumerate(said[:place])}
            right["oldest"] += min(latest, key=latest.__getitem__) == said[place]
    assert asked > 5000
    assert max(right.values()) / asked < 1 / 3


def test_recall_documents_depend_on_seed_and_number_alone() -> None:
    def drawn(count: int, seed: int) -> list[str]:
        return list(recall_documents(TEXTS, count, characters=(200, 400), seed=seed))

    assert drawn(5, 1) == drawn(9, 1)[:5]
    assert not set(drawn(5, 1)) & set(drawn(5, 2))


def test_copies_are_one_line_said_again() -> None:
    times = set()
    kinds: set[str] = set()
    for text in copy_documents(TEXTS, 300, seed=0):
        first, *again = text.splitlines()
        assert again == [first] * len(again)
        times.add(len(again))
        parts = first.split(" ")
        assert 4 <= len(parts) <= 39
        kinds |= {kind_of(part) for part in parts}
    assert times == {1, 2}
    assert kinds == {"word", "name", "letter"}


def test_copies_name_nobody_that_the_test_asks_for() -> None:
    lines = {text.splitlines()[0] for text in copy_documents(TEXTS, 300, seed=0)}
    names = {part for line in lines for part in line.split(" ") if kind_of(part) == "name"}
    assert len(names) > 500
    assert {side_of(name) for name in names} == {"train"}


def test_copies_alike_have_parts_of_one_kind() -> None:
    def one_kind(alike: float) -> float:
        kinds = [
            {kind_of(part) for part in text.splitlines()[0].split(" ")}
            for text in copy_documents(TEXTS, 300, seed=0, alike=alike)
        ]
        return float(np.mean([len(found) == 1 for found in kinds]))

    assert one_kind(1.0) == 1.0
    assert one_kind(0.0) < 0.15
    assert 0.4 < one_kind(0.5) < 0.65


def test_copies_depend_on_seed_and_number_alone() -> None:
    def drawn(count: int, seed: int) -> list[str]:
        return list(copy_documents(TEXTS, count, seed=seed))

    assert drawn(5, 1) == drawn(9, 1)[:5]
    assert not set(drawn(5, 1)) & set(drawn(5, 2))


def test_copies_of_no_words_are_refused() -> None:
    with pytest.raises(BadInput, match="need words"):
        next(copy_documents(["1\n2\n"], 1, seed=0))


def kind_of(part: str) -> str:
    if len(part) == 1:
        return "letter"
    return "name" if part[0].isupper() else "word"
