"""Long documents: whole files of one project, every file once, none with another project's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.support import recipe as small_recipe
from ziphius.config.errors import BadInput
from ziphius.data.documents import Document
from ziphius.data.encode import EncodedDocuments
from ziphius.data.engine import LocalEngine
from ziphius.data.prepare import prepare
from ziphius.data.projects import LongDocuments
from ziphius.data.shards import PROJECTS_FILE, ShardWriter, TokenShards
from ziphius.data.tokenizer import BOS_ID, EOS_ID, train_tokenizer
from ziphius.data.tokens import document_keys

TOKENIZER = train_tokenizer(["ab"], 300)

names = st.builds(
    lambda project, file: f"{project}/{file}.py",
    st.sampled_from(["a", "a-b", "b"]),
    st.integers(0, 30),
)
corpora = st.dictionaries(
    names | st.sampled_from(["a.py", "b.py"]), st.text("xyz", max_size=30), min_size=1, max_size=20
)


def encoded(texts: dict[str, str], *, records: bool = False) -> EncodedDocuments:
    documents = [Document(name, text, is_record=records) for name, text in texts.items()]
    return EncodedDocuments(documents, TOKENIZER)


def text_of(ids: np.ndarray) -> str:
    return TOKENIZER.decode(ids.tolist(), skip_special_tokens=False)


@given(corpora, st.integers(2, 60))
def test_files_of_a_project_lie_whole_behind_one_another(
    texts: dict[str, str], longest: int
) -> None:
    tokens = encoded(texts)
    long = LongDocuments(tokens, longest)
    documents = [long.document(index) for index in range(len(long.lengths))]
    assert long.lengths.tolist() == [len(document) for document in documents]
    assert long.files == len(texts)
    assert len(set(long.keys.tolist())) == len(documents), "two documents have one identity"
    found: list[tuple[str, ...]] = []
    for document in documents:
        starts = np.flatnonzero(document == BOS_ID)
        assert document[0] == BOS_ID
        files = np.split(document, starts[1:])
        assert all(file[-1] == EOS_ID for file in files)
        assert len(document) <= longest or len(files) == 1
        found.append(tuple(text_of(file[1:-1]) for file in files))
    by_project: dict[str, list[str]] = {}
    for name in sorted(texts):
        by_project.setdefault(Document(name, "").package, []).append(texts[name])
    assert sorted(text for files in found for text in files) == sorted(texts.values())
    # Documents begin and end where projects do, and a next file would not have fitted.
    at = 0
    for project in by_project.values():
        rest = list(project)
        while rest:
            files, size = list(found[at]), int(long.lengths[at])
            assert rest[: len(files)] == files
            rest = rest[len(files) :]
            assert not rest or size + len(rest[0]) + 2 > longest
            at += 1
    assert at == len(found)


def test_records_stand_alone() -> None:
    texts = {"all.jsonl#1": "x", "all.jsonl#2": "y"}
    assert LongDocuments(encoded(texts), 100).lengths.tolist() == [6]
    assert LongDocuments(encoded(texts, records=True), 100).lengths.tolist() == [3, 3]


def test_another_length_is_another_stream() -> None:
    tokens = encoded({"a/1.py": "x", "a/2.py": "y"})
    fingerprints = {LongDocuments(tokens, longest).fingerprint for longest in (3, 4, 50)}
    assert len(fingerprints | {tokens.fingerprint}) == 4


def test_prepared_text_knows_its_projects(words: Path, tmp_path: Path) -> None:
    prepared = prepare(small_recipe(words), tmp_path / "text", LocalEngine())
    shards = prepared.sources[0][0]
    assert set(shards.projects.tolist()) == set(document_keys(["alpha", "beta"]).tolist())
    assert LongDocuments(shards, 10**6).files == 8
    assert len(LongDocuments(shards, 10**6).lengths) == 2


def test_shards_of_earlier_versions_say_so(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", "<u2") as writer:
        writer.append("x/1", np.arange(3, dtype=np.int32))
    (tmp_path / "a" / PROJECTS_FILE).unlink()
    shards = TokenShards(tmp_path / "a", writer.shards, writer.fingerprint)
    with pytest.raises(BadInput, match=r"projects\.npy.*prepare the text again"):
        LongDocuments(shards, 10)
