"""Fill in the middle: the parts put back together are the document, whatever else is there."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.data.support import TOKENIZER
from ziphius.config.errors import BadInput
from ziphius.data.documents import Document
from ziphius.data.encode import EncodedDocuments, encode
from ziphius.data.fim import FillInTheMiddle
from ziphius.data.tokenizer import BOS_ID, EOS_ID, FIM_BEGIN, FIM_END, FIM_HOLE

BEGIN, HOLE, END = (TOKENIZER.token_to_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
some_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.lists(
    st.sampled_from(
        ["whale ", "日本", "🐋", "e\u0301", ")\n", FIM_BEGIN, FIM_HOLE, "\r\n", "12345"]
    ),
    max_size=12,
).map("".join)


def rearranged(
    texts: list[str], *, rate: float = 1.0, seed: int = 0, epoch: int = 0, first: int = 0
) -> list[list[int]]:
    """Apply FIM to texts named by their numbers from ``first`` on."""
    documents = [Document(f"{first + i:06}", text) for i, text in enumerate(texts)]
    source = EncodedDocuments(documents, TOKENIZER)
    epochs = np.full(len(texts), epoch, dtype=np.int64)
    originals = [source.document(i) for i in range(len(texts))]
    fim = FillInTheMiddle(TOKENIZER, rate, seed)
    return [ids.tolist() for ids in fim.apply(originals, source.keys, epochs)]


def parts_of(ids: list[int]) -> tuple[list[int], list[int], list[int]] | None:
    """Return prefix, middle and suffix of a rearranged document, in the order of the report."""
    if BEGIN not in ids:
        return None
    hole, end = ids.index(HOLE), ids.index(END)
    assert ids[:2] == [BOS_ID, BEGIN]
    assert ids[-1] == EOS_ID
    assert [ids.count(special) for special in (BOS_ID, BEGIN, HOLE, END, EOS_ID)] == [1] * 5
    assert hole < end
    return ids[2:hole], ids[end + 1 : -1], ids[hole + 1 : end]


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False)


@given(texts=st.lists(some_text, min_size=1, max_size=5), seed=st.integers(0, 2**40))
def test_parts_put_together_are_the_document(texts: list[str], seed: int) -> None:
    plain = [ids.tolist() for ids in encode([Document("x", t) for t in texts], TOKENIZER)]
    for text, before, ids in zip(texts, plain, rearranged(texts, seed=seed), strict=True):
        parts = parts_of(ids)
        if len(text) < 3:
            assert parts is None
            assert ids == before
        else:
            assert parts is not None
            decoded = [decode(part) for part in parts]
            assert "".join(decoded) == text
            assert all(decoded)
            # Each part is tokenised for itself.
            documents = [Document("x", part) for part in decoded]
            assert [[BOS_ID, *p, EOS_ID] for p in parts] == [
                ids.tolist() for ids in encode(documents, TOKENIZER)
            ]


def test_cuts_fall_inside_tokens_and_between_characters() -> None:
    text = "whale dives deep, " * 4
    whole = TOKENIZER.encode(text)
    borders = {start for start, _ in whole.offsets}
    cuts = []
    for ids in rearranged([text] * 50):
        parts = parts_of(ids)
        assert parts is not None
        cuts.append(len(decode(parts[0])))
    assert 0 < sum(cut not in borders for cut in cuts) < len(cuts)


def test_every_pair_of_places_is_equally_likely() -> None:
    count, text = 6000, "abcde"  # four places between characters, six pairs
    found = Counter()
    for ids in rearranged([text] * count):
        parts = parts_of(ids)
        assert parts is not None
        found[tuple(len(decode(part)) for part in parts)] += 1
    assert set(found) == {(a, b - a, 5 - b) for b in range(2, 5) for a in range(1, b)}
    spread = (count * 1 / 6 * 5 / 6) ** 0.5
    assert all(abs(times - count / 6) < 4 * spread for times in found.values())


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.6, 1.0])
def test_documents_are_rearranged_at_the_rate(rate: float) -> None:
    count = 4000
    share = np.mean([BEGIN in ids for ids in rearranged(["abc"] * count, rate=rate)])
    assert abs(share - rate) <= 4 * (rate * (1 - rate) / count) ** 0.5


@settings(max_examples=30)
@given(seed=st.integers(0, 2**20), epoch=st.integers(0, 50), cut=st.integers(1, 99))
def test_a_documents_fate_does_not_depend_on_the_others(seed: int, epoch: int, cut: int) -> None:
    texts = [f"text number {i} " * (1 + i % 3) for i in range(100)]
    whole = rearranged(texts, rate=0.5, seed=seed, epoch=epoch)
    assert whole[:cut] == rearranged(texts[:cut], rate=0.5, seed=seed, epoch=epoch)
    assert whole[cut:] == rearranged(texts[cut:], rate=0.5, seed=seed, epoch=epoch, first=cut)


def test_seed_and_epoch_change_which_documents_and_where() -> None:
    texts = ["the whale dives deep"] * 40
    variants = [rearranged(texts, rate=0.5, seed=s, epoch=e) for s in (0, 1) for e in (0, 1)]
    chosen = [tuple(BEGIN in ids for ids in variant) for variant in variants]
    assert len(set(chosen)) == 4
    everywhere = [rearranged(texts, seed=s, epoch=e) for s in (0, 1) for e in (0, 1)]
    assert len({tuple(map(tuple, variant)) for variant in everywhere}) == 4


def test_epochs_of_one_call_may_differ() -> None:
    source = EncodedDocuments([Document("a", "the whale dives deep")], TOKENIZER)
    fim = FillInTheMiddle(TOKENIZER, 0.5, 0)
    epochs = np.arange(20)
    together = fim.apply([source.document(0)] * 20, np.repeat(source.keys, 20), epochs)
    alone = [fim.apply([source.document(0)], source.keys, epochs[i : i + 1])[0] for i in range(20)]
    assert [ids.tolist() for ids in together] == [ids.tolist() for ids in alone]
    assert 0 < sum(BEGIN in ids for ids in together) < 20


def test_a_tokenizer_without_the_tokens_is_refused() -> None:
    other = Tokenizer.from_str(TOKENIZER.to_str().replace(FIM_HOLE, "<hole>"))
    with pytest.raises(BadInput, match=r"no <｜fim▁hole｜>: set data\.fim_rate = 0") as error:
        FillInTheMiddle(other, 0.1, 0)
    assert "\n" not in str(error.value)
