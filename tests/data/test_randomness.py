"""Draws: the published finaliser, fixed for good, without order, bias or collisions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.data.randomness import draw, happens

WORD = 2**64


def mix(word: int) -> int:
    """SplitMix64's output for a state, in Python's own integers."""
    word = (word + 0x9E3779B97F4A7C15) % WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % WORD
    return word ^ (word >> 31)


def test_the_reference_is_splitmix64() -> None:
    # The generator's first outputs from seed 1234567, as its author's test vectors give them.
    states = [1234567 + n * 0x9E3779B97F4A7C15 for n in range(3)]
    assert [mix(state % WORD) for state in states] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(
    seed=st.integers(0, 2**70),
    number=st.integers(0, 2**63 - 1),
    keys=st.lists(st.integers(0, WORD - 1), min_size=1, max_size=5),
)
def test_draws_are_chained_finalisers(seed: int, number: int, keys: list[int]) -> None:
    found = draw("rows", seed, number, np.array(keys, dtype=np.uint64))
    words = [int.from_bytes(b"rows", "little"), seed % WORD]
    words += [seed // WORD] if seed >= WORD else []
    for key, value in zip(keys, found.tolist(), strict=True):
        state = 0
        for word in (*words, number, key):
            state = mix(state ^ word)
        assert value == state


def test_draws_stay_as_they_are() -> None:
    """A change here changes every run that is to be resumed."""
    found = [*draw("order", 0, 0, np.arange(2)), *draw("fim", 7, np.array([3]), np.array([9]))]
    assert found == [14176179949573002983, 15493471757957149640, 10899829065968677611]


def test_draws_do_not_depend_on_what_else_is_drawn() -> None:
    keys = np.arange(50, dtype=np.uint64)
    whole = draw("split", 3, 4, keys)
    assert draw("split", 3, 4, keys[::-1]).tolist() == whole[::-1].tolist()
    assert [int(draw("split", 3, 4, keys[i : i + 1])[0]) for i in range(50)] == whole.tolist()
    assert draw("split", 3, np.full(50, 4), keys).tolist() == whole.tolist()


def test_purpose_seed_and_names_all_matter() -> None:
    keys = np.arange(200)
    sets = [
        draw(purpose, seed, epoch, keys)
        for purpose in ("fim", "order")
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(np.unique(np.concatenate(sets))) == 8 * 200


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_events_happen_at_their_rate(rate: float) -> None:
    count = 20_000
    share = happens(draw("fim", 5, np.arange(count)), rate).mean()
    assert abs(share - rate) <= 4 * (rate * (1 - rate) / count) ** 0.5


def test_nothing_warns_when_words_wrap_around() -> None:
    with np.errstate(all="raise"):
        draw("rows", WORD - 1, WORD - 1, np.array([WORD - 1], dtype=np.uint64))
