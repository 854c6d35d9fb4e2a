"""Copies: planted ones are found, what only looks alike stays, and nothing depends on the order."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.texts import prose, write
from ziphius.config.data import DataConfig
from ziphius.data.corpus import Corpus, read_corpus
from ziphius.data.deduplicate import (
    HASHES,
    band_width,
    exact_copies,
    fingerprint,
    near_copies,
    words_of,
)

LICENCE = "# " + prose(999, 150).replace("\n", "\n# ") + "\n"
ORIGINAL = prose(1, 600)


def jaccard(first: str, second: str) -> float:
    """The definition, on sets, by other means than the code's."""
    one, other = (
        set(zip(*(re.findall(r"\w+", text)[i:] for i in range(5)), strict=False))
        for text in (first, second)
    )
    return len(one & other) / len(one | other)


def estimate(first: str, second: str) -> float:
    one, other = (np.frombuffer(fingerprint(text), "<u4") for text in (first, second))
    return float((one == other).mean())


def with_changed_words(text: str, share: float, seed: int = 0) -> str:
    rng = random.Random(seed)
    return re.sub(r"\w+", lambda m: "edited" if rng.random() < share else m[0], text)


def removed(tmp_path: Path, files: dict[str, str], **settings: object) -> dict[str, str | None]:
    """Return what was removed, with the document that it copies."""
    write(tmp_path, {**files, "unrelated.txt": prose(77, 100)})
    corpus = read_corpus(DataConfig(source=str(tmp_path), **settings))
    return {document.name: document.copy_of for document in corpus.removed}


COPIES = {
    "some words changed": with_changed_words(ORIGINAL, 0.01),
    "a paragraph moved": "\n".join(
        [*ORIGINAL.split("\n")[40:], *ORIGINAL.split("\n")[:40]],
    ),
    "another comment on top": "# Copyright someone else\n# All rights\n" + ORIGINAL,
    "the end cut off": ORIGINAL[: int(0.9 * len(ORIGINAL))],
    "blanks and punctuation changed": ORIGINAL.replace(" ", " , ").replace("\n", "\r\n\n"),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_an_edited_copy_is_removed(tmp_path: Path, copy: str) -> None:
    assert copy != ORIGINAL
    assert jaccard(copy, ORIGINAL) > 0.85
    assert removed(tmp_path, {"a.txt": ORIGINAL, "b.txt": copy}) == {"b.txt": "a.txt"}
    for other in ("exact", "none"):
        assert removed(tmp_path, {}, deduplicate=other) == {}


def template(name: str, value: int) -> str:
    return (
        f"class {name}(Base):\n    def run(self):\n        return self.call({value})\n\n"
        f"    def {name}_reverse(self):\n        return None\n"
    )


DIFFERENT = {
    "one licence, other programs": (LICENCE + prose(2, 300), LICENCE + prose(3, 300)),
    "short files from one template": (template("Add", 1), template("Subtract", 2)),
    "two short texts": ("x = 1\n", "y = 2\n"),
    "short texts of the same words": ("a + b\n", "a - b\n"),
    "nothing but punctuation": ("+-*/\n" * 5, "()[]\n" * 5),
    "half of it is new": (ORIGINAL, ORIGINAL[: len(ORIGINAL) // 2] + prose(4, 300)),
    "the same words in another order": (
        ORIGINAL,
        " ".join(random.Random(0).sample(ORIGINAL.split(), len(ORIGINAL.split()))),
    ),
}


@pytest.mark.parametrize("texts", DIFFERENT.values(), ids=DIFFERENT)
def test_what_only_looks_alike_stays(tmp_path: Path, texts: tuple[str, str]) -> None:
    assert removed(tmp_path, {"a.txt": texts[0], "b.txt": texts[1]}) == {}


def test_equal_texts_are_removed_however_short(tmp_path: Path) -> None:
    files = {"a.txt": "x\n", "b.txt": "x\r\n", "c.txt": "y\n"}
    assert removed(tmp_path, files, deduplicate="exact") == {"b.txt": "a.txt"}


def test_chinese_text_is_compared_character_by_character(tmp_path: Path) -> None:
    rng = random.Random(5)
    text = "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(600))
    assert len(words_of(text)) == 600
    edited = text[:300] + "新" + text[301:]
    other = "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(600))
    files = {"a.txt": text, "b.txt": edited, "c.txt": other}
    assert removed(tmp_path, files) == {"b.txt": "a.txt"}


def test_the_first_by_name_stays_and_every_copy_is_close_to_one_that_stays(tmp_path: Path) -> None:
    """A chain: each is a near copy of the one before, the last is far from the first."""
    chain = [ORIGINAL]
    for step in range(8):
        chain.append(with_changed_words(chain[-1], 0.02, seed=step))
    assert jaccard(chain[0], chain[-1]) < 0.6
    files = {f"{index}.txt": text for index, text in enumerate(chain)}
    gone = removed(tmp_path, files)
    assert "0.txt" not in gone
    kept = files.keys() - gone.keys()
    assert len(kept) > 1
    for name, original in gone.items():
        assert original in kept
        assert original < name
        assert jaccard(files[name], files[original]) > 0.7


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), shuffle=st.randoms())
def test_the_order_of_reading_changes_nothing(seed: int, shuffle: random.Random) -> None:
    """Whatever the places, the same names go as copies of the same names."""
    rng = random.Random(seed)
    texts = {}
    for family in range(4):
        base = prose(rng.randrange(10**6), 80)
        for member in range(4):
            texts[f"{rng.random()}-{family}"] = with_changed_words(base, 0.03 * member, member)
    from ziphius.data.examine import examine
    from ziphius.data.readers import Raw
    from ziphius.data.selection import select
    from ziphius.data.sources import Source

    config = DataConfig(near_threshold=0.6)
    source = Source("data.source", config.mixture[0], "", ())
    results = []
    names = list(texts)
    for _ in range(3):
        found = examine([Raw(0, name, True, 0, texts[name]) for name in names], config)
        selection = select(found, [], [source], config)
        held = tuple(found[place].name for place in selection.heldout)
        results.append((selection.removed, held))
        shuffle.shuffle(names)
    assert results[0] == results[1] == results[2]
    assert results[0][0]


def test_the_estimate_is_near_the_exact_similarity() -> None:
    """The standard deviation is at most 1 / (2 sqrt(HASHES)), and there is no bias."""
    errors = []
    for seed in range(60):
        first = prose(seed, 500)
        second = with_changed_words(first, 0.002 * seed, seed)
        errors.append(estimate(first, second) - jaccard(first, second))
    assert np.abs(errors).max() < 4 * 0.5 / HASHES**0.5
    assert abs(np.mean(errors)) < 4 * 0.5 / (HASHES * len(errors)) ** 0.5
    assert np.std(errors) > 0  # texts that differ are estimated, not looked up


def test_a_long_text_has_the_fingerprint_of_its_shingles(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fingerprint(ORIGINAL)
    for characters in (1, 50, 1000):
        monkeypatch.setattr("ziphius.data.deduplicate._CHARACTERS_AT_ONCE", characters)
        assert fingerprint(ORIGINAL) == whole
    assert len(whole) == 4 * HASHES
    assert fingerprint("four words are few") == b""
    assert fingerprint("five words are just enough") != b""


@given(st.lists(st.binary(max_size=1), max_size=12))
def test_exact_copies_name_the_first(digests: list[bytes]) -> None:
    expected = {
        index: digests.index(digest)
        for index, digest in enumerate(digests)
        if digests.index(digest) != index
    }
    assert exact_copies(digests) == expected


@settings(max_examples=30)
@given(
    threshold=st.sampled_from([0.3, 0.5, 0.8, 0.95, 1.0]),
    seed=st.integers(0, 1000),
    count=st.integers(0, 30),
)
def test_near_copies_are_those_that_comparing_all_pairs_finds(
    threshold: float, seed: int, count: int
) -> None:
    """Pairs well above the threshold are all found; none below it ever is."""
    rng = np.random.default_rng(seed)
    bases = rng.integers(0, 2**32, (3, HASHES), dtype=np.uint32)
    rows = bases[rng.integers(0, 3, count)]
    noise = rng.random((count, HASHES)) < rng.random((count, 1)) ** 2
    prints_NP = np.where(noise, rng.integers(0, 2**32, rows.shape, dtype=np.uint32), rows)
    kept: list[int] = []
    for row, copied in near_copies(prints_NP, threshold):
        similar = {k: float((prints_NP[k] == prints_NP[row]).mean()) for k in kept}
        best = max(similar.values(), default=0.0)
        if copied is None:
            kept.append(row)
            assert best < min(1.0, threshold + 0.1) or best < threshold
        else:
            assert copied[1] == best >= threshold
            assert copied[0] == min(k for k in kept if similar[k] == best)


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_miss_few_pairs_and_compare_few(threshold: float) -> None:
    width = band_width(threshold)
    bands = HASHES // width
    assert 1 <= width <= HASHES
    if width > 1:
        assert (1 - threshold**width) ** bands <= 0.005
    if threshold == 0.8:
        assert 1 - (1 - 0.4**width) ** bands < 0.05


def test_held_out_text_has_no_copy_in_training(tmp_path: Path) -> None:
    """Packages a and b hold copies of one another: whichever is held out, no copy trains."""
    for every in (2, 3, 4, 5):
        folder = tmp_path / str(every)
        files = {}
        for number in range(6):
            text = prose(number, 200)
            files[f"a{number}/x.txt"] = text
            files[f"b{number}/x.txt"] = with_changed_words(text, 0.01, number)
        write(folder, files)
        corpus: Corpus = read_corpus(DataConfig(source=str(folder), holdout_every=every))
        assert len(corpus.removed) == 6
        for held in corpus.heldout:
            assert all(jaccard(held.text, document.text) < 0.1 for document in corpus.train)
