"""The loader: every token once an epoch, an order by name alone, and the same batches on resume."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.data.support import DOCUMENTS, TOKENIZER, Numbered
from ziphius.config.errors import BadInput
from ziphius.data.documents import Document
from ziphius.data.encode import EncodedDocuments
from ziphius.data.loader import Loader
from ziphius.data.rows import Batch, row_targets
from ziphius.data.tokenizer import BOS, BOS_ID, EOS, train_tokenizer
from ziphius.data.tokens import Tokens
from ziphius.data.windows import Stream
from ziphius.kernels.loss import IGNORED

MORE = [Document(f"more{i}", f"({i});\n" * (3 + i)) for i in range(8)]
OTHER = EncodedDocuments(MORE, TOKENIZER)
SOURCE = EncodedDocuments(DOCUMENTS, TOKENIZER)


def make(*sources: Tokens, tokenizer: Any = TOKENIZER, **changes: Any) -> Loader:
    given_: dict[str, Any] = {"sequence_length": 7, "seed": 0, "workers": 0}
    mixture = [(source, 1.0) for source in sources or (SOURCE,)]
    return Loader(mixture, tokenizer, **{**given_, **changes})


def equal(one: Batch, other: Batch) -> bool:
    return torch.equal(one.tokens_BS, other.tokens_BS) and torch.equal(
        one.documents_BS, other.documents_BS
    )


def rows_of(*batches: Batch) -> list[tuple[list[int], list[int]]]:
    return [
        (tokens, documents)
        for batch in batches
        for tokens, documents in zip(
            batch.tokens_BS.tolist(), batch.documents_BS.tolist(), strict=True
        )
    ]


def test_batches_have_the_promised_shapes_and_types() -> None:
    batch = make().next_batch(3)
    assert batch.tokens_BS.shape == batch.documents_BS.shape == (3, 8)
    assert batch.tokens_BS.dtype == torch.int64
    assert batch.documents_BS.dtype == torch.int32
    for tensor in (batch.tokens_BS, batch.documents_BS):
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()


# What a run sees


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(2, 60), min_size=30, max_size=50),
    sequence_length=st.integers(2, 6),
    seed=st.integers(0, 2**40),
)
def test_windows_of_a_large_corpus_add_up_to_its_epoch(
    sizes: list[int], sequence_length: int, seed: int
) -> None:
    """The law of the class, over an epoch of many windows."""
    source = Numbered(sizes)
    loader = make(source, sequence_length=sequence_length, seed=seed, window_tokens=1)
    length = 64 * (sequence_length + 1)
    windows = loader.tokens_per_epoch // length
    assume(windows > 1)
    batches = [loader.next_batch(1)]
    while loader.state()["window"] < windows:
        batches.append(loader.next_batch(1))
    found: Counter[int] = Counter()
    for batch in batches:
        found.update(row_targets(batch, 0, document_mask=False).flatten().tolist())
    del found[IGNORED]
    begun = sum(int((batch.tokens_BS == BOS_ID).sum()) for batch in batches)
    first = sum(int((batch.tokens_BS[:, 0] == BOS_ID).sum()) for batch in batches)
    assert found.pop(BOS_ID, 0) == begun - first
    documents, _ = Stream(source, seed).between(0, windows * length)
    assert found == Counter(int(t) for i in documents for t in source.document(i)[1:])
    assert begun == len(documents) > len(sizes) / 2


def test_epochs_differ_in_order_and_in_rows() -> None:
    source = Numbered([20] * 30)
    loader = make(source, sequence_length=9)
    epochs: list[list[list[int]]] = [[], [], []]
    while (window := loader.state()["window"]) < 3:
        epochs[window] += loader.next_batch(1).tokens_BS.tolist()
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert sorted(map(sorted, epochs[0])) != sorted(map(sorted, epochs[1]))


def test_neighbouring_rows_are_of_many_documents() -> None:
    source = Numbered([160] * 40)
    loader = make(source, sequence_length=9)
    owners = np.repeat(np.arange(40), 159)
    batch = loader.next_batch(32).tokens_BS.numpy()
    documents = owners[batch[:, 1] - source.first]
    assert len(set(documents.tolist())) > 16


def test_the_order_of_documents_in_the_source_does_not_matter() -> None:
    other = EncodedDocuments(DOCUMENTS[::-1], TOKENIZER)
    one, two = make(fim_rate=0.3), make(other, fim_rate=0.3)
    assert one.state() == two.state()
    assert all(equal(one.next_batch(5), two.next_batch(5)) for _ in range(30))


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 2**20))
def test_the_rows_do_not_depend_on_how_they_are_batched(sizes: list[int], seed: int) -> None:
    rates = {"fim_rate": 0.3, "token_split_rate": 0.3, "seed": seed}
    one, other = make(**rates), make(**rates)
    some = [one.next_batch(size) for size in sizes]
    single = [other.next_batch(1) for _ in range(sum(sizes))]
    assert rows_of(*some) == rows_of(*single)
    assert one.state() == other.state()


def test_padding_is_what_batches_have() -> None:
    loader = make(Numbered([5] * 30), sequence_length=7)
    batch = loader.next_batch(30)  # every row holds one document: no two fit in
    assert loader.state()["window"] == 1
    assert float((batch.documents_BS == -1).float().mean()) == loader.padding == 3 / 8


def test_fim_and_splits_leave_every_character() -> None:
    loader = make(sequence_length=100, fim_rate=0.5, token_split_rate=0.5)
    batches = [loader.next_batch(1)]
    while loader.state()["window"] == 0:
        batches.append(loader.next_batch(1))
    found: Counter[str] = Counter()
    for tokens, _ in rows_of(*batches):
        text = TOKENIZER.decode(tokens, skip_special_tokens=False)
        for part in text.split(BOS)[1:]:
            found.update(_without_fim(part.split(EOS)[0]))
    assert found == Counter("".join(document.text for document in DOCUMENTS))


def _without_fim(text: str) -> str:
    for name in ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"):
        text = text.replace(name, "")
    return text


# Stopping and going on


@settings(max_examples=80)
@given(
    sizes=st.lists(st.integers(1, 9), max_size=25),
    after=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    sequence_length=st.integers(2, 12),
    seed=st.integers(0, 2**70),
    rate=st.sampled_from([0.0, 0.3]),
    large=st.booleans(),
)
def test_a_restored_loader_goes_on_with_the_same_batches(
    sizes: list[int],
    after: list[int],
    sequence_length: int,
    seed: int,
    rate: float,
    large: bool,
) -> None:
    """Within windows and across their borders, whatever the sizes of the batches."""
    changes = {
        "sequence_length": sequence_length,
        "seed": seed,
        "fim_rate": rate,
        "token_split_rate": rate,
        "window_tokens": 1 if large else 2**24,
    }
    first = make(SOURCE, OTHER, **changes)
    for size in sizes:
        first.next_batch(size)
    state = json.loads(json.dumps(first.state()))
    assert all(type(value) is int for value in state.values())
    assert all(value < 2**53 for key, value in state.items() if key != "seed")
    second = make(SOURCE, OTHER, **changes)
    second.load_state(state)
    assert second.state() == first.state() == state
    for size in after:
        assert equal(first.next_batch(size), second.next_batch(size))


def test_a_loader_may_go_back() -> None:
    loader = make(workers=2)
    state = loader.state()
    once = [loader.next_batch(9) for _ in range(12)]
    assert loader.state()["window"] > 1
    loader.load_state(state)
    assert all(equal(batch, loader.next_batch(9)) for batch in once)
    loader.close()


OTHER_TOKENIZER = train_tokenizer(["aa"], 300)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make(seed=1), "seed differs"),
        (lambda: make(sequence_length=8), "sequence_length differs"),
        (lambda: make(EncodedDocuments(DOCUMENTS[1:], TOKENIZER)), "text differs"),
        (
            lambda: make(
                EncodedDocuments([*DOCUMENTS[1:], Document("x", DOCUMENTS[0].text)], TOKENIZER)
            ),
            "text differs",
        ),
        (lambda: make(SOURCE, SOURCE), "text, weights differs"),
        (lambda: Loader([(SOURCE, 2.0)], TOKENIZER, sequence_length=7, seed=0), "weights differs"),
        (lambda: make(tokenizer=OTHER_TOKENIZER), "tokenizer differs"),
        (lambda: make(fim_rate=0.1), "fim_rate differs"),
        (lambda: make(token_split_rate=0.1), "token_split_rate differs"),
        (lambda: make(window_tokens=10**6), "window_tokens differs"),
        (lambda: make(seed=1, fim_rate=0.1), "seed, fim_rate differs"),
    ],
)
def test_the_state_of_another_stream_is_refused(other: Any, message: str) -> None:
    loader = make()
    loader.next_batch(3)
    before = loader.state()
    with pytest.raises(BadInput, match=rf"loader state: {message} from") as error:
        loader.load_state(other().state())
    assert "\n" not in str(error.value)
    assert loader.state() == before


def test_equal_sources_and_other_threads_are_the_same_stream() -> None:
    loader = make(EncodedDocuments(DOCUMENTS, TOKENIZER), workers=2)
    loader.load_state(make().state())
    loader.close()


def test_impossible_states_are_refused() -> None:
    loader = make()
    with pytest.raises(BadInput, match="not complete"):
        loader.load_state({"window": 0, "row": 3})
    with pytest.raises(BadInput, match="window -1, row 0"):
        loader.load_state(loader.state() | {"window": -1})
    loader.load_state(loader.state() | {"row": 10**6})
    with pytest.raises(BadInput, match="row 1000000 of window 0, which has"):
        loader.next_batch(1)


# Too little text


def test_without_documents_there_is_nothing_to_load() -> None:
    with pytest.raises(BadInput, match=r"data\.source: no documents to train on"):
        make(EncodedDocuments([], TOKENIZER))
    with pytest.raises(BadInput, match="source 2 has no documents"):
        make(SOURCE, EncodedDocuments([], TOKENIZER))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(BadInput, match="source 2: weight"):
        Loader([(SOURCE, 1.0), (SOURCE, weight)], TOKENIZER, sequence_length=7, seed=0)


def test_text_shorter_than_a_row_is_refused() -> None:
    make(Numbered([4, 6]), sequence_length=9)
    with pytest.raises(BadInput, match=r"data\.source: 10 tokens are fewer than one row of") as e:
        make(Numbered([4, 6]), sequence_length=10)
    assert "pretrain.sequence_length = 10" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_more_rows_than_the_text_has_is_refused(workers: int) -> None:
    loader = make(Numbered([5] * 30), sequence_length=7, workers=workers)
    state = loader.state()
    with pytest.raises(BadInput, match=r"data\.source: 150 tokens make 30 rows of") as error:
        loader.next_batch(31)
    for needed in ("pretrain.sequence_length = 7", "pretrain.batch_size = 31"):
        assert needed in str(error.value)
    assert "\n" not in str(error.value)
    assert loader.state() == state
    loader.next_batch(30)
    loader.close()


def test_a_batch_may_be_larger_than_a_window_of_a_large_corpus() -> None:
    source = Numbered([8] * 500)
    loader = make(source, sequence_length=7, window_tokens=1)
    batch = loader.next_batch(7 * 64)
    assert loader.state()["window"] == 7
    assert len({tuple(row) for row in batch.tokens_BS.tolist()}) == 7 * 64
    with pytest.raises(BadInput, match="4,000 tokens make 500 rows"):
        loader.next_batch(501)


def test_fim_needs_its_tokens() -> None:
    text = TOKENIZER.to_str().replace("<｜fim▁end｜>", "<end>")
    tokenizer = type(TOKENIZER).from_str(text)
    make(tokenizer=tokenizer)
    with pytest.raises(BadInput, match=r"set data\.fim_rate = 0"):
        make(tokenizer=tokenizer, fim_rate=0.1)


# Threads


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    seed=st.integers(0, 2**20),
    large=st.booleans(),
)
def test_batches_are_the_same_whatever_the_number_of_threads(
    sizes: list[int], seed: int, large: bool
) -> None:
    changes = {
        "seed": seed,
        "fim_rate": 0.3,
        "token_split_rate": 0.3,
        "window_tokens": 1 if large else 2**24,
    }
    loaders = [make(SOURCE, OTHER, workers=n, **changes) for n in (0, 1, 3)]
    for size in sizes:
        one, *others = [loader.next_batch(size) for loader in loaders]
        assert all(equal(one, other) for other in others)
    for loader in loaders:
        loader.close()


class Unreadable(Numbered):
    """Cannot be read while ``broken``."""

    broken = True

    def document(self, index: int) -> NDArray[np.int32]:
        if self.broken:
            raise OSError("the disk is gone")
        return super().document(index)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_in_a_thread_is_raised_by_next_batch(workers: int) -> None:
    source = Unreadable([9] * 50)
    loader = make(source, workers=workers)
    state = loader.state()
    with pytest.raises(OSError, match="the disk is gone"):
        loader.next_batch(4)
    assert loader.state() == state
    source.broken = False
    assert len(loader.next_batch(4)) == 4
    loader.close()


def test_an_error_later_in_a_batch_leaves_the_loader_where_it_was() -> None:
    source = Unreadable([8] * 500)
    source.broken = False
    loader = make(source, sequence_length=7, window_tokens=1)
    loader.next_batch(60)
    state = loader.state()
    source.broken = True
    with pytest.raises(OSError, match="the disk is gone"):
        loader.next_batch(60)
    assert loader.state() == state
    source.broken = False
    again = make(source, sequence_length=7, window_tokens=1)
    again.load_state(state)
    assert equal(loader.next_batch(60), again.next_batch(60))


def test_a_dropped_loader_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    loader = make(workers=2)
    loader.next_batch(2)
    assert set(threading.enumerate()) > before
    del loader
    gc.collect()
    ends = time.monotonic() + 60
    while set(threading.enumerate()) - before:
        assert time.monotonic() < ends, "threads go on"
        time.sleep(0.002)


def test_the_next_window_is_ready_before_it_is_needed() -> None:
    source = Numbered([9] * 50)
    loader = make(source, workers=1)
    loader.next_batch(1)
    ends = time.monotonic() + 60
    while len(source.asked) < 100:
        assert time.monotonic() < ends, "the second window was not made"
        time.sleep(0.002)
    loader.close()
    assert Counter(source.asked) == dict.fromkeys(range(50), 2)
    assert source.asked[:50] != source.asked[50:], "another order"
