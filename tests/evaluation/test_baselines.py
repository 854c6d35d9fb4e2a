"""The baselines: a slow model written from the definition agrees, and every row sums to one."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ziphius.config.errors import BadInput
from ziphius.evaluation.baselines import NgramModel, xz_bits_per_byte

TEXT = (
    "the quick brown fox jumps over the lazy dog while the quiet cat watches the quick bird; "
    "a model that has read these words should find the other words of these lines easy.\n"
)


class SlowModel:
    """Interpolated modified Kneser-Ney from dictionaries and recursion, for small texts."""

    def __init__(self, text: bytes, order: int) -> None:
        self.order = min(order, len(text))
        self.counts: dict[int, Counter[bytes]] = {}
        for n in range(1, self.order + 1):
            if n == self.order:
                self.counts[n] = Counter(text[i : i + n] for i in range(len(text) - n + 1))
            else:
                longer = {text[i : i + n + 1] for i in range(len(text) - n)}
                self.counts[n] = Counter(gram[1:] for gram in longer)
        self.discounts = {n: self.estimate(counts) for n, counts in self.counts.items()}
        self.following: dict[bytes, list[bytes]] = defaultdict(list)
        for counts in self.counts.values():
            for gram in counts:
                self.following[gram[:-1]].append(gram)

    @staticmethod
    def estimate(counts: Counter[bytes]) -> list[float]:
        seen = Counter(counts.values())
        if not (seen[1] and seen[2] and seen[3]):
            return [0.5, 0.5, 0.5]
        y = seen[1] / (seen[1] + 2 * seen[2])
        raw = [i - (i + 1) * y * seen[i + 1] / seen[i] for i in (1, 2, 3)]
        return [min(max(value, 0.1), i + 0.9) for i, value in enumerate(raw)]

    def probability(self, context: bytes, byte: int, n: int) -> float:
        if n == 0:
            return 1 / 256
        below = self.probability(context[1:], byte, n - 1)
        family = self.following.get(context, [])
        if not family:
            return below
        counts, discounts = self.counts[n], self.discounts[n]
        total = sum(counts[gram] for gram in family)
        freed = sum(discounts[min(counts[gram], 3) - 1] for gram in family)
        own = counts[context + bytes([byte])]
        kept = own - discounts[min(own, 3) - 1] if own else 0
        return kept / total + freed / total * below

    def bits_per_byte(self, text: bytes) -> float:
        bits = 0.0
        for i, byte in enumerate(text):
            context = text[max(0, i - self.order + 1) : i]
            bits -= math.log2(self.probability(context, byte, len(context) + 1))
        return bits / len(text)


@settings(max_examples=60, deadline=None)
@given(
    order=st.integers(1, 8),
    text=st.lists(st.sampled_from([b"a", b"ab", b"abc", b"\x00", b"\xff\xfe"]), min_size=1).map(
        b"".join
    ),
    probe=st.binary(min_size=1, max_size=12) | st.text("abc", min_size=1).map(str.encode),
)
def test_equals_a_model_written_from_the_definition(order: int, text: bytes, probe: bytes) -> None:
    slow = SlowModel(text, order)
    assert NgramModel(text, order).bits_per_byte(probe) == pytest.approx(
        slow.bits_per_byte(probe), abs=1e-9
    )


def test_equals_the_slow_model_on_real_words_where_discounts_are_estimated() -> None:
    rng = random.Random(0)
    text = " ".join(rng.choices(TEXT.split(), k=600)).encode()
    probe = " ".join(rng.choices(TEXT.split(), k=40)).encode() + b" unseen \xf0\x9f\x90\x8b"
    slow = SlowModel(text, 6)
    assert slow.discounts[6] != [0.5, 0.5, 0.5]
    assert NgramModel(text).bits_per_byte(probe) == pytest.approx(
        slow.bits_per_byte(probe), abs=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(order=st.integers(1, 8), context=st.binary(max_size=10) | st.sampled_from([b"the qu", b""]))
def test_the_256_next_bytes_have_probability_one_together(order: int, context: bytes) -> None:
    following = NgramModel(TEXT.encode(), order).next_byte(context)
    assert following.shape == (256,)
    assert (following > 0).all()
    assert following.sum() == pytest.approx(1.0, abs=1e-12)


def test_next_byte_and_bits_per_byte_are_the_same_model() -> None:
    model, probe = NgramModel(TEXT.encode(), 4), b"the quiet bird"
    bits = [-np.log2(model.next_byte(probe[:i])[byte]) for i, byte in enumerate(probe)]
    assert model.bits_per_byte(probe) == pytest.approx(np.mean(bits), abs=1e-12)


def test_beats_the_order_0_entropy_of_text_it_has_not_seen() -> None:
    rng = random.Random(1)
    train = " ".join(rng.choices(TEXT.split(), k=3000)).encode()
    held = " ".join(rng.choices(TEXT.split(), k=500)).encode()
    entropy = -sum(n / len(held) * math.log2(n / len(held)) for n in Counter(held).values())
    assert NgramModel(train).bits_per_byte(held) < 0.5 * entropy


def test_each_longer_context_helps_on_text() -> None:
    rng = random.Random(2)
    train = " ".join(rng.choices(TEXT.split(), k=3000)).encode()
    held = " ".join(rng.choices(TEXT.split(), k=500)).encode()
    bits = [NgramModel(train, order).bits_per_byte(held) for order in (1, 2, 3)]
    assert bits[0] > bits[1] > bits[2]


def test_xz_packs_repetition_to_nothing_and_noise_not_at_all() -> None:
    assert xz_bits_per_byte(b"whale " * 50_000) < 0.02
    assert 8.0 < xz_bits_per_byte(random.Random(0).randbytes(100_000)) < 8.02


@pytest.mark.parametrize("order", [0, 9])
def test_an_order_that_does_not_fit_is_refused(order: int) -> None:
    with pytest.raises(BadInput, match=f"order {order}"):
        NgramModel(b"text", order)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(BadInput, match="empty"):
        NgramModel(b"")
    with pytest.raises(BadInput, match="empty"):
        NgramModel(b"text").bits_per_byte(b"")
    with pytest.raises(BadInput, match="empty"):
        xz_bits_per_byte(b"")
