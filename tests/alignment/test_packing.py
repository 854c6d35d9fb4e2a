"""Rows of samples: every sample once an epoch, unseen by its neighbours, and a way back."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import F64, random_model
from ziphius.alignment.packing import PackedSamples, PackedUnits, as_rows, held_out
from ziphius.alignment.records import Sample
from ziphius.config.errors import BadInput
from ziphius.data.rows import LEARNED, row_targets
from ziphius.data.tokenizer import train_tokenizer
from ziphius.kernels.loss import IGNORED
from ziphius.training.objective import losses

LENGTHS = st.lists(st.integers(2, 9), min_size=1, max_size=30)


def sample(number: int, length: int) -> Sample:
    """Tokens that tell which sample they are of; the first third is a prompt."""
    tokens = np.full(length, 3 + number, np.int32)
    tokens[0] = 0
    return Sample(tokens, np.arange(length) >= max(1, length // 3))


def packed(lengths: list[int], seed: int = 0) -> PackedSamples:
    return PackedSamples([sample(*n) for n in enumerate(lengths)], sequence_length=8, seed=seed)


def documents(batches: PackedSamples, rows: int) -> Counter[int]:
    """Count the samples of the next rows by their number."""
    found: Counter[int] = Counter()
    batch = batches.next_batch(rows)
    for tokens_S, documents_S in zip(batch.tokens_BS, batch.documents_BS, strict=True):
        for document in range(int(documents_S.max()) + 1):
            found[int(tokens_S[documents_S == document][-1]) - 3] += 1
    return found


@given(LENGTHS, st.integers(0, 3))
def test_an_epoch_has_every_sample_once(lengths: list[int], seed: int) -> None:
    batches = packed(lengths, seed)
    rows = batches.rows_per_epoch
    for _ in range(3):
        assert documents(batches, rows) == Counter(range(len(lengths)))
        assert batches.rows_per_epoch == rows


@given(LENGTHS)
def test_every_learned_token_is_a_target_once(lengths: list[int]) -> None:
    batches = packed(lengths)
    batch = batches.next_batch(batches.rows_per_epoch)
    targets_BT = row_targets(batch, 0, document_mask=True)
    expected: Counter[int] = Counter()
    for number, length in enumerate(lengths):
        expected[3 + number] = int(sample(number, length).learned.sum())
    assert Counter(targets_BT[targets_BT != IGNORED].tolist()) == expected


def test_epochs_differ_and_a_seed_repeats_them() -> None:
    lengths = [2 + n % 7 for n in range(40)]
    one, same, other = packed(lengths), packed(lengths), packed(lengths, seed=1)
    rows = one.rows_per_epoch
    first, second = one.next_batch(rows).tokens_BS, one.next_batch(rows).tokens_BS
    assert torch.equal(first, same.next_batch(rows).tokens_BS)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other.next_batch(rows).tokens_BS)


@given(LENGTHS, st.integers(0, 12), st.integers(1, 4))
def test_it_goes_on_where_it_stopped(lengths: list[int], before: int, size: int) -> None:
    whole, begun = packed(lengths), packed(lengths)
    for _ in range(before):
        whole.next_batch(size)
        begun.next_batch(size)
    resumed = packed(lengths)
    resumed.load_state(begun.state())
    for _ in range(3):
        assert torch.equal(whole.next_batch(size).tokens_BS, resumed.next_batch(size).tokens_BS)


def test_the_state_of_other_samples_is_refused() -> None:
    with pytest.raises(BadInput, match="samples differ"):
        packed([3, 4]).load_state(packed([3, 5]).state())


def test_no_samples_are_refused() -> None:
    with pytest.raises(BadInput, match="no sample"):
        packed([])


def test_a_packed_sample_is_worth_what_it_is_alone() -> None:
    """The loss and its gradients: neighbours are not seen, positions do not matter."""
    model = random_model(precision=F64)
    generator = np.random.default_rng(0)
    two = [Sample(generator.integers(3, 61, n).astype(np.int32), np.arange(n) >= 2) for n in (5, 7)]

    def loss_of(rows: list[list[Sample]], length: int) -> tuple[float, torch.Tensor]:
        from ziphius.config.sft import SftConfig

        model.zero_grad()
        found, _ = losses(
            model,
            as_rows(rows, length),
            SftConfig(balance_loss_weight=0),
            mtp_loss_weight=0.3,
            target_count=1,
            sequence_count=1,
            document_mask=True,
        )
        found.total.backward()
        grad = model.embed_tokens.weight.grad
        assert grad is not None
        return found.total.item(), grad.clone()

    together, grad = loss_of([two], 14)
    apart, expected = loss_of([[two[0]], [two[1]]], 8)
    assert together == pytest.approx(apart, rel=1e-12)
    torch.testing.assert_close(grad, expected)


def test_held_out_rows_measure_what_the_assistant_wrote() -> None:
    tokenizer = train_tokenizer(["abc"], 290)
    words = [tokenizer.encode(word, add_special_tokens=False).ids for word in ("ab", "cab")]
    samples = [
        Sample(np.array([0, 5, *ids, 1], np.int32), np.array([0, 0, *[1] * len(ids), 1], bool))
        for ids in words
    ]
    rows = held_out(samples, tokenizer, 12)
    assert rows.bytes == len("ab") + len("cab")
    learned = rows.targets_MT[rows.targets_MT != IGNORED].tolist()
    assert sorted(learned) == sorted([*words[0], 1, *words[1], 1])
    assert rows.masked_MS is not None
    assert rows.tokens_MT.min() >= 0


def test_rows_say_which_tokens_are_learned() -> None:
    batch = as_rows([[sample(0, 3), sample(1, 4)]], 9)
    assert batch.documents_BS.tolist() == [[0, 0, 0, 1, 1, 1, 1, -1, -1]]
    assert batch.fields[LEARNED].tolist() == [
        [False, True, True, False, True, True, True, False, False]
    ]


@given(st.lists(st.tuples(st.integers(2, 4), st.integers(2, 4)), min_size=1, max_size=12))
def test_units_stay_side_by_side_in_one_row(pairs: list[tuple[int, int]]) -> None:
    """As documents 2n and 2n + 1, every unit once an epoch; spare places stay empty."""
    units = [[sample(2 * n, a), sample(2 * n + 1, b)] for n, (a, b) in enumerate(pairs)]
    batches = PackedUnits(units, sequence_length=8, seed=0, spare=1)
    batch = batches.next_batch(batches.rows_per_epoch)
    assert not (batch.documents_BS[:, -1] >= 0).any()
    found = []
    for tokens_S, documents_S in zip(batch.tokens_BS, batch.documents_BS, strict=True):
        for document in range(0, int(documents_S.max()) + 1, 2):
            one, other = (int(tokens_S[documents_S == document + n][-1]) - 3 for n in (0, 1))
            assert (one % 2, other) == (0, one + 1)
            found.append(one // 2)
    assert sorted(found) == list(range(len(pairs)))
