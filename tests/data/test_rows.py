"""Targets of rows, against loops over the definition (facts 3.1)."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.support import FIRST_ID, TOKENIZER, Numbered
from ziphius.data.loader import Loader
from ziphius.data.rows import Batch, row_targets
from ziphius.data.tokenizer import BOS_ID, PAD_ID
from ziphius.kernels.loss import IGNORED

# A piece of a row: how many tokens, and whether it is a document's beginning.
Piece = tuple[int, bool]


def batch_of(rows: list[list[Piece]], width: int) -> Batch:
    """Make rows of pieces, cut at ``width`` and filled with padding; tokens count up."""
    tokens_BS, documents_BS, token = [], [], FIRST_ID
    for pieces in rows:
        row, documents = [], []
        for number, (count, begins) in enumerate(pieces):
            row += [BOS_ID if begins else token, *range(token + 1, token + count)]
            documents += [number] * count
            token += count
        row, documents = row[:width], documents[:width]
        tokens_BS.append(row + [PAD_ID] * (width - len(row)))
        documents_BS.append(documents + [-1] * (width - len(row)))
    return Batch(torch.tensor(tokens_BS), torch.tensor(documents_BS, dtype=torch.int32))


rows_and_width = st.tuples(
    st.lists(
        st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=6), min_size=1, max_size=4
    ),
    st.integers(2, 16),
)


def slow_targets(batch: Batch, depth: int, document_mask: bool) -> list[list[int]]:
    """Position i, counted from 1, has input t_i (and t_{i+k}) and target t_{i+k+1}."""
    result = []
    for tokens, documents in zip(
        batch.tokens_BS.tolist(), batch.documents_BS.tolist(), strict=True
    ):
        targets = []
        for i in range(1, len(tokens) - depth):
            target, before = i + depth + 1 - 1, i + depth - 1  # places in the lists, from 0
            here = documents[i - 1]
            counts = tokens[target] != PAD_ID
            if document_mask:
                counts = counts and documents[target] == here
            elif documents[target] != documents[before]:
                counts = counts and tokens[target] == BOS_ID
            targets.append(tokens[target] if counts else IGNORED)
        result.append(targets)
    return result


@given(given_=rows_and_width, depth=st.integers(0, 3), document_mask=st.booleans())
def test_targets_are_those_of_the_definition(
    given_: tuple[list[list[Piece]], int], depth: int, document_mask: bool
) -> None:
    rows, width = given_
    batch = batch_of(rows, width)
    found = row_targets(batch, depth, document_mask=document_mask)
    assert found.dtype == torch.int64
    assert found.shape == (len(rows), max(0, width - 1 - depth))
    assert found.tolist() == slow_targets(batch, depth, document_mask)


def test_a_row_in_full() -> None:
    # Two whole documents, the end of a third, padding.
    tokens = [BOS_ID, 11, 12, BOS_ID, 21, 31, 32, PAD_ID]
    documents = [0, 0, 0, 1, 1, 2, 2, -1]
    batch = Batch(torch.tensor([tokens]), torch.tensor([documents], dtype=torch.int32))
    x = IGNORED
    for depth, document_mask, expected in [
        (0, False, [11, 12, BOS_ID, 21, x, 32, x]),
        (0, True, [11, 12, x, 21, x, 32, x]),
        (1, False, [12, BOS_ID, 21, x, 32, x]),
        (1, True, [12, x, x, x, x, x]),
        (2, False, [BOS_ID, 21, x, 32, x]),
        (2, True, [x, x, x, x, x]),
    ]:
        assert row_targets(batch, depth, document_mask=document_mask).tolist() == [expected]


def test_targets_change_nothing() -> None:
    batch = batch_of([[(3, True), (3, False)]], 8)
    tokens_BS, documents_BS = batch.tokens_BS.clone(), batch.documents_BS.clone()
    row_targets(batch, 0, document_mask=True)
    assert torch.equal(batch.tokens_BS, tokens_BS)
    assert torch.equal(batch.documents_BS, documents_BS)


@pytest.mark.parametrize("document_mask", [False, True])
@given(
    sizes=st.lists(st.integers(2, 70), min_size=1, max_size=40),
    sequence_length=st.integers(1, 20),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_has_every_token_as_a_target_once(
    document_mask: bool, sizes: list[int], sequence_length: int, seed: int
) -> None:
    source = Numbered([*sizes, sequence_length + 1])
    loader = Loader(
        [(source, 1.0)],
        TOKENIZER,
        sequence_length=sequence_length,
        seed=seed,
        workers=0,
    )
    batch = loader.next_batch(1)
    while loader.state()["window"] == 0:
        more = loader.next_batch(1)
        batch = Batch(
            torch.cat((batch.tokens_BS, more.tokens_BS)),
            torch.cat((batch.documents_BS, more.documents_BS)),
        )
    found = Counter(row_targets(batch, 0, document_mask=document_mask).flatten().tolist())
    del found[IGNORED]
    begun = int((batch.tokens_BS == BOS_ID).sum())
    first = int((batch.tokens_BS[:, 0] == BOS_ID).sum())
    assert begun == len(source.sizes)
    assert found.pop(BOS_ID, 0) == (0 if document_mask else begun - first)
    assert found == Counter(source.all_tokens())


@given(depth=st.integers(1, 3), seed=st.integers(0, 2**20))
def test_a_deeper_module_has_fewer_targets_by_what_drops_out(depth: int, seed: int) -> None:
    """Without a mask, depth k loses the targets in a row's first k + 1 places, and no other."""
    loader = Loader([(Numbered(list(range(2, 40))), 1.0)], TOKENIZER, sequence_length=12, seed=seed)
    batch = loader.next_batch(20)
    loader.close()
    main = row_targets(batch, 0, document_mask=False)
    assert torch.equal(row_targets(batch, depth, document_mask=False), main[:, depth:])


def test_micro_batches_are_the_batch() -> None:
    batch = batch_of([[(3, True), (2, True)], [(6, True)], [(2, False)]], 7)
    parts = list(batch.split(2))
    assert [len(part) for part in parts] == [2, 1]
    assert torch.equal(torch.cat([part.tokens_BS for part in parts]), batch.tokens_BS)
    assert torch.equal(torch.cat([part.documents_BS for part in parts]), batch.documents_BS)
    assert batch.to("meta").tokens_BS.device.type == "meta"
    assert batch.to("meta").documents_BS.device.type == "meta"
