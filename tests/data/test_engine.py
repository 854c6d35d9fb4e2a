"""The local engine: one process or several, the same results in the same order."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.data.texts import jsonl, prose, write
from ziphius.config.data import DataConfig
from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.data import engine
from ziphius.data.documents import Document
from ziphius.data.encode import EncodedDocuments, encode
from ziphius.data.engine import LocalEngine, batched, cut_long_text, encode_spans
from ziphius.data.sources import open_sources
from ziphius.data.spool import Spool
from ziphius.data.tokenizer import plain_text_tokenizer, train_tokenizer

TEXTS = [prose(seed, 5 + 40 * seed) for seed in range(12)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 30))
def test_batches_end_when_they_are_full(sizes: list[int], most: int) -> None:
    batches = list(batched(sizes, lambda size: size, most))
    assert [size for batch in batches for size in batch] == sizes
    assert all(batches)
    assert all(sum(batch) >= most for batch in batches[:-1])
    assert all(sum(batch[:-1]) < most for batch in batches)


def test_several_processes_give_what_one_gives(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "EXAMINE_BYTES", 500)
    monkeypatch.setattr(engine, "ENCODE_BYTES", 900)
    write(tmp_path, {f"{n:02d}.txt": text for n, text in enumerate(TEXTS)})
    write(tmp_path, {"rows.jsonl": jsonl({"text": text[::-1] + "\udc80"} for text in TEXTS)})
    config = DataConfig(source=str(tmp_path))
    pieces = open_sources(config)[0].pieces
    with Spool(tmp_path / "spool") as spool:
        for text in TEXTS:
            spool.append(text)
        spool.flush()
        spans = [spool.span(place) for place in range(len(TEXTS))]
        with LocalEngine() as one, LocalEngine(2) as two:
            examined = list(one.examined(pieces, config))
            assert len(examined) == 24
            assert list(two.examined(pieces, config)) == examined
            encoded = list(one.encoded(spool.path, spans, tokenizer))
            others = list(two.encoded(spool.path, spans, tokenizer))
            assert two._pool is not None
    memory = EncodedDocuments([Document(f"{n:02d}", t) for n, t in enumerate(TEXTS)], tokenizer)
    for index, (ids, other) in enumerate(zip(encoded, others, strict=True)):
        assert np.array_equal(ids, other)
        assert np.array_equal(ids, memory.document(index))


def test_an_error_of_a_reader_arrives(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "fine", "b.jsonl": "{"})
    config = DataConfig(source=str(tmp_path))
    with LocalEngine() as local, pytest.raises(BadInput, match=r"b.jsonl: line 1"):
        list(local.examined(open_sources(config)[0].pieces, config))


def stop_this_process(batch: list[int]) -> list[int]:
    os.kill(os.getpid(), signal.SIGKILL)
    return batch


def test_a_worker_that_is_killed_is_told_in_one_line() -> None:
    message = "a worker process ended without a word.*fewer --workers"
    with LocalEngine(2) as local, pytest.raises(ZiphiusError, match=message):
        list(local._map(stop_this_process, [[1], [2], [3]]))


# Long texts

PIECES = [
    "word",
    "Word",
    " ",
    "\n",
    "\n\n",
    "  ",
    ".",
    "é",
    "漢字",
    "12345",
    "_a",
    "\r\n",
    "\t",
    "{",
]
MIXED = plain_text_tokenizer(train_tokenizer(["".join(PIECES) * 3, "word\n\nword ." * 9], 340))


@settings(max_examples=200)
@given(st.lists(st.sampled_from(PIECES), max_size=60), st.integers(1, 20))
def test_a_long_text_is_cut_where_its_tokens_are(pieces: list[str], characters: int) -> None:
    text = "".join(pieces)
    parts = cut_long_text(text, characters)
    assert "".join(parts) == text
    ids = [n for part in parts for n in MIXED.encode(part, add_special_tokens=False).ids]
    assert ids == MIXED.encode(text, add_special_tokens=False).ids


def test_long_texts_are_cut_and_short_ones_are_not() -> None:
    text = "line of words\n" * 100
    assert len(cut_long_text(text, 100)) > 10
    assert cut_long_text(text, 10**6) == [text]
    assert cut_long_text("1\n" * 500, 100) == ["1\n" * 500]  # no line begins with a letter


def test_a_text_that_is_cut_has_one_beginning_and_one_end(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["", TEXTS[9], "a\n" * 50, TEXTS[2]]
    cuts = lambda text: cut_long_text(text, 30)  # noqa: E731
    assert len(cuts(texts[1])) > 5
    whole = [ids.tolist() for ids in encode([Document("", text) for text in texts], tokenizer)]
    monkeypatch.setattr(engine, "cut_long_text", cuts)
    with Spool(tmp_path / "spool") as spool:
        for text in texts:
            spool.append(text)
        spool.flush()
        spans = [spool.span(place) for place in range(len(texts))]
        encoded = [ids.tolist() for ids in encode_spans(spans, spool.path, tokenizer)]
    assert encoded == whole
