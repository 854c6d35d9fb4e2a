"""Preparing text: the same as in memory, whole or not at all, the same bytes every time."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.data.preparing import contents, make_mixture, recipe, run
from tests.data.texts import prose, write
from ziphius.config.errors import BadInput
from ziphius.data import engine
from ziphius.data.corpus import read_corpus
from ziphius.data.encode import EncodedDocuments
from ziphius.data.prepare import tokenizer_sample
from ziphius.data.prepared import open_prepared
from ziphius.data.tokenizer import save_tokenizer, token_bytes, train_tokenizer


@pytest.fixture
def sources(tmp_path: Path) -> str:
    return make_mixture(tmp_path)


def test_prepared_text_is_the_text_of_memory(tmp_path: Path, sources: str) -> None:
    """Documents, held-out part, digest, tokens, keys and fingerprints: training cannot tell."""
    given = recipe(sources, "data.holdout_every=5")
    corpus = read_corpus(given.data)
    prepared = run(given, tmp_path / "out", shard_tokens=300)
    assert prepared.heldout == corpus.heldout
    assert prepared.sha256 == corpus.sha256
    assert prepared.description == corpus.description
    assert prepared.removed_counts == corpus.removed_counts
    assert prepared.skipped == corpus.skipped == 1
    assert prepared.heldout_packages == corpus.heldout_packages
    assert prepared.documents == len(corpus.train)
    assert prepared.train_bytes == corpus.train_bytes
    assert prepared.heldout_bytes == corpus.heldout_bytes
    tokenizer = train_tokenizer([d.text for d in corpus.train], 400)
    assert prepared.tokenizer.to_str() == tokenizer.to_str()
    total = 0
    for (tokens, weight), (documents, expected_weight) in zip(
        prepared.sources, corpus.train_by_source, strict=True
    ):
        memory = EncodedDocuments(documents, tokenizer)
        assert weight == expected_weight
        assert tokens.fingerprint == memory.fingerprint
        assert np.array_equal(tokens.lengths, memory.lengths)
        assert np.array_equal(tokens.keys, memory.keys)
        for index in range(len(documents)):
            assert np.array_equal(tokens.document(index), memory.document(index))
        total += int(tokens.lengths.sum())
    assert prepared.tokens == total
    assert len(list((tmp_path / "out" / "source-00").glob("tokens-*.npy"))) > 2


def test_a_single_text_is_divided_as_in_memory(tmp_path: Path) -> None:
    write(tmp_path, {"book.txt": "\ufeff" + prose(1, 900).replace("\n", "\r\n")})
    given = recipe(f"data.source={tmp_path / 'book.txt'}")
    corpus, prepared = read_corpus(given.data), run(given, tmp_path / "out")
    assert prepared.heldout == corpus.heldout
    assert prepared.sha256 == corpus.sha256
    ((tokens, _),) = prepared.sources
    text = prepared.tokenizer.decode(tokens.document(0), skip_special_tokens=True)
    assert text == corpus.train[0].text


def test_the_folder_has_what_its_docstring_lists(tmp_path: Path, sources: str) -> None:
    prepared = run(recipe(sources), tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {
        "prepared.json", "tokenizer.json", "tokenizer_config.json", "heldout.jsonl",
        "removed.jsonl", "manifest.json",
        *(f"source-{n:02d}/{f}.npy" for n in (0, 1)
          for f in ("tokens-00000", "lengths", "keys", "projects")),
    }  # fmt: skip
    described = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert described["settings"]["data"]["near_threshold"] == 0.8
    assert "fim_rate" not in described["settings"]["data"]
    assert [source["weight"] for source in described["sources"]] == [3.0, 1.0]
    assert described["vocab_size"] == prepared.tokenizer.get_vocab_size()
    tokens = np.load(tmp_path / "out" / "source-00" / "tokens-00000.npy", allow_pickle=False)
    assert tokens.dtype == np.uint16
    text_bytes = token_bytes(prepared.tokenizer)[tokens].sum()
    assert text_bytes == described["sources"][0]["bytes"]
    removed = [
        json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()
    ]
    assert {(entry["name"], entry["reason"], entry.get("copy_of")) for entry in removed} == {
        ("empty.txt", "empty", None),
        ("latin.txt", "not UTF-8", None),
        ("nul.txt", "binary", None),
        ("p3/m.py", "exact duplicate", "p0/copy.py"),
        ("p4/m.py", "near duplicate", "p1/near.py"),
        ("rows.jsonl.gz#1", "exact duplicate", "p11/m.py"),
    }


def test_the_same_text_gives_the_same_bytes_whatever_the_processes(
    tmp_path: Path, sources: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "EXAMINE_BYTES", 2000)
    monkeypatch.setattr(engine, "ENCODE_BYTES", 3000)
    run(recipe(sources), tmp_path / "one")
    run(recipe(sources), tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_given_tokenizer_is_used_and_kept(tmp_path: Path, sources: str) -> None:
    tokenizer = train_tokenizer([prose(5, 300)], 350)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    prepared = run(recipe(sources, f"tokenizer.path={tmp_path / 'tokenizer'}"), tmp_path / "out")
    assert prepared.tokenizer.to_str() == tokenizer.to_str()


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path, sources: str) -> None:
    whole = json.loads(train_tokenizer([prose(5, 300)], 350).to_str())
    whole["model"]["vocab"]["far away"] = 2**16
    save_tokenizer(Tokenizer.from_str(json.dumps(whole)), tmp_path / "tokenizer")
    given = recipe(sources, f"tokenizer.path={tmp_path / 'tokenizer'}", "model.vocab_size=70000")
    run(given, tmp_path / "out")
    shard = tmp_path / "out" / "source-01" / "tokens-00000.npy"
    assert np.load(shard, allow_pickle=False).dtype == np.uint32


def test_the_tokenizer_is_trained_on_a_bounded_sample(tmp_path: Path, sources: str) -> None:
    given = recipe(sources, "data.tokenizer_bytes=4000")
    seen: list[tuple[int, int | None]] = []

    def follow(phase: str, done: int, total: int | None) -> None:
        if phase == "training the tokenizer":
            seen.append((done, total))

    prepared = run(given, tmp_path / "out", on_progress=follow)
    assert seen[-1][0] == seen[-1][1] <= 4000
    whole = run(recipe(sources), tmp_path / "whole")
    assert prepared.tokenizer.to_str() != whole.tokenizer.to_str()


def test_a_sample_follows_weights_and_names() -> None:
    class Text:
        def __init__(self, source: int, name: str, size: int) -> None:
            self.source, self.name, self.size = source, name, size
            self.span = (source, size)

    def size(texts: list[Text], weights: list[float], most: int, source: int) -> int:
        return sum(s[1] for s in tokenizer_sample(texts, weights, most) if s[0] == source)  # type: ignore[arg-type]

    texts = [Text(source, f"{n}", 10) for source in (0, 1) for n in range(100)]
    assert [size(texts, [3, 1], 400, source) for source in (0, 1)] == [300, 100]
    assert [size(texts, [3, 1], 10**6, source) for source in (0, 1)] == [1000, 1000]
    # A text that is larger than the share is taken only where it is all there is.
    assert size([Text(0, "a", 50), Text(0, "b", 70)], [1], 20, 0) == 50


def test_progress_goes_through_the_phases(tmp_path: Path, sources: str) -> None:
    told: list[tuple[str, int, int | None]] = []
    run(recipe(sources), tmp_path / "out", on_progress=lambda *now: told.append(now))
    phases = list(dict.fromkeys(phase for phase, _, _ in told))
    assert phases == ["reading", "training the tokenizer", "encoding"]
    for phase in phases:
        own = [(done, total) for name, done, total in told if name == phase]
        assert own == sorted(own)
        assert own[-1][0] == own[-1][1]


# What must not happen


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, sources: str) -> None:
    run(recipe(sources), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(BadInput, match="holds prepared text already"):
        run(recipe(sources), tmp_path / "out")
    assert contents(tmp_path / "out") == before
    write(tmp_path / "mine", {"letter.txt": "mine"})
    with pytest.raises(BadInput, match="holds files"):
        run(recipe(sources), tmp_path / "mine")
    with pytest.raises(BadInput, match="is a file"):
        run(recipe(sources), tmp_path / "mine" / "letter.txt")
    (tmp_path / "empty").mkdir()
    run(recipe(sources), tmp_path / "empty")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.source=/no/such/place", "no such file or folder"),
        ("data.min_characters=1000000", "no text left to train on"),
        ("tokenizer.path=/no/such/tokenizer", "no tokenizer.json found"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    tmp_path: Path, sources: str, setting: str, said: str
) -> None:
    overrides = [setting] if setting.startswith("data.source") else [sources, setting]
    with pytest.raises(BadInput, match=said) as error:
        run(recipe(*overrides), tmp_path / "new" / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new" / "out").exists()
    assert not list((tmp_path / "new").glob(".*")) if (tmp_path / "new").exists() else True


def test_a_tokenizer_that_is_too_large_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer([prose(5, 300)], 500), tmp_path)
    given = recipe("data.source=/never/looked/at", f"tokenizer.path={tmp_path}")
    with pytest.raises(BadInput, match=r"model\.vocab_size is 400: set model\.vocab_size to"):
        run(given, tmp_path / "out")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, sources: str) -> None:
    with files_of_at_most(9000), pytest.raises(BadInput, match="not saved") as error:
        run(recipe(sources), tmp_path / "new" / "out")
    assert "free more space" in str(error.value)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "new").iterdir()) == []


def test_stopping_leaves_nothing_behind(tmp_path: Path, sources: str) -> None:
    def stop(phase: str, done: int, total: int | None) -> None:
        if phase == "encoding":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe(sources), tmp_path / "new" / "out", on_progress=stop)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_prepared_folder_can_be_opened_again(tmp_path: Path, sources: str) -> None:
    prepared = run(recipe(sources), tmp_path / "out")
    again = open_prepared(tmp_path / "out")
    assert again.heldout == prepared.heldout
    assert again.sha256 == prepared.sha256


def test_prepared_sources_are_read_when_the_recipe_says(tmp_path: Path) -> None:
    write(tmp_path, {name: prose(number, 60) for number, name in enumerate(("a.txt", "b.txt"))})
    given = recipe(
        f'data.sources=[{{path="{tmp_path / "a.txt"}", end="25%"}}, '
        f'{{path="{tmp_path / "b.txt"}", begin=1000}}]'
    )
    assert read_corpus(given.data).spans == ((0, "25%"), (1000, "100%"))
    assert run(given, tmp_path / "out").spans == ((0, "25%"), (1000, "100%"))
