"""Shards give back what was written, and say which file is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ziphius.config.errors import BadInput
from ziphius.data.documents import Document
from ziphius.data.encode import EncodedDocuments
from ziphius.data.shards import Shard, ShardWriter, TokenShards
from ziphius.data.tokenizer import train_tokenizer
from ziphius.data.tokens import document_keys

DOCUMENTS = [np.arange(3 + size % 7, dtype=np.int32) * (size + 1) for size in range(20)]


def write(
    folder: Path,
    documents: list[NDArray[np.int32]],
    dtype: str = "<u2",
    shard_tokens: int = 30,
    names: list[str] | None = None,
) -> ShardWriter:
    with ShardWriter(folder, dtype, shard_tokens) as writer:
        for number, ids in enumerate(documents):
            writer.append(names[number] if names else f"{number:03d}.txt", ids)
    return writer


def reopen(writer: ShardWriter) -> TokenShards:
    return TokenShards(writer.folder, writer.shards, writer.fingerprint)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=20),
    shard_tokens=st.integers(1, 100),
    dtype=st.sampled_from(["<u2", "<u4"]),
    seed=st.integers(0, 99),
)
def test_every_document_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    shard_tokens: int,
    dtype: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    highest = 2 ** (16 if dtype == "<u2" else 31)
    documents = [rng.integers(0, highest, length).astype(np.int32) for length in lengths]
    writer = write(tmp_path_factory.mktemp("shards") / "a", documents, dtype, shard_tokens)
    tokens = reopen(writer)
    assert tokens.lengths.tolist() == lengths
    assert tokens.lengths.dtype == np.int64
    assert tokens.keys.dtype == np.uint64
    for index in np.random.default_rng(seed).permutation(len(documents)):
        found = tokens.document(int(index))
        assert found.dtype == np.int32
        assert np.array_equal(found, documents[index])
    assert writer.tokens == sum(lengths) == sum(shard.tokens for shard in writer.shards)
    # A shard ends with the document that fills it, and no sooner.
    assert all(shard.tokens >= shard_tokens for shard in writer.shards[:-1])
    assert all(shard.tokens < shard_tokens + max(lengths) for shard in writer.shards)


def test_files_are_plain_arrays_that_are_not_read_into_memory(tmp_path: Path) -> None:
    writer = write(tmp_path / "a", DOCUMENTS)
    whole = [np.load(tmp_path / "a" / shard.file, allow_pickle=False) for shard in writer.shards]
    assert len(whole) > 2
    assert all(array.dtype == np.uint16 for array in whole)
    assert np.array_equal(np.concatenate(whole), np.concatenate(DOCUMENTS))
    assert all(isinstance(array, np.memmap) for array in reopen(writer)._shards)


def test_they_are_the_documents_of_memory(tmp_path: Path) -> None:
    """Lengths, keys, tokens and fingerprint: a run may go on with either."""
    texts = [Document(f"{n}/é.txt", f"text {n} " * n) for n in range(9)]
    tokenizer = train_tokenizer([text.text for text in texts], 300)
    memory = EncodedDocuments(texts, tokenizer)
    ids = [memory.document(index) for index in range(len(texts))]
    disk = reopen(write(tmp_path / "a", ids, names=[text.name for text in texts]))
    assert disk.fingerprint == memory.fingerprint
    assert np.array_equal(disk.lengths, memory.lengths)
    assert np.array_equal(disk.keys, memory.keys)
    assert np.array_equal(disk.keys, document_keys(text.name for text in texts))


def test_no_document_is_beyond_the_last(tmp_path: Path) -> None:
    tokens = reopen(write(tmp_path / "a", DOCUMENTS))
    for index in (-1, len(DOCUMENTS)):
        with pytest.raises(IndexError):
            tokens.document(index)


@pytest.mark.parametrize("file", ["tokens-00001.npy", "lengths.npy", "keys.npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "another kind", "a pickle"])
def test_a_wrong_file_is_named(tmp_path: Path, file: str, damage: str) -> None:
    writer = write(tmp_path / "a", DOCUMENTS)
    path = tmp_path / "a" / file
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "another kind":
        np.save(path, np.zeros((2, 3)))
    else:
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BadInput) as error:
        reopen(writer)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    writer = write(tmp_path / "a", DOCUMENTS)
    np.save(tmp_path / "a" / "lengths.npy", np.ones(len(DOCUMENTS), dtype="<i8"))
    with pytest.raises(BadInput, match="do not belong together"):
        reopen(writer)
    first = writer.shards[0]
    other = [Shard(first.file, first.documents, first.tokens + 1), *writer.shards[1:]]
    write(tmp_path / "b", DOCUMENTS)
    with pytest.raises(BadInput, match="do not belong together"):
        TokenShards(tmp_path / "b", other, 0)


def test_the_fingerprint_sees_names_and_tokens(tmp_path: Path) -> None:
    names = [f"{number}" for number in range(len(DOCUMENTS))]
    changed = [ids.copy() for ids in DOCUMENTS]
    changed[3][0] += 1
    prints = {
        write(tmp_path / "a", DOCUMENTS, names=names).fingerprint,
        write(tmp_path / "b", changed, names=names).fingerprint,
        write(tmp_path / "c", DOCUMENTS, names=[*names[:-1], "x"]).fingerprint,
        write(tmp_path / "d", DOCUMENTS[:-1], names=names[:-1]).fingerprint,
    }
    assert len(prints) == 4
    assert all(0 <= value < 2**48 for value in prints)
    assert write(tmp_path / "e", DOCUMENTS, "<u4", 7, names).fingerprint in prints
