"""Random numbers by name: the same for the same name, others for every other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ziphius.inference.noise import Noise, Stream, fresh_seed

V = 300


@settings(max_examples=60)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.lists(st.integers(0, V - 1)))
def test_a_token_has_its_number_whoever_is_asked_for_with_it(
    seed: int, position: int, tokens: list[int]
) -> None:
    """One by one, as part of few or many, in any order, repeated or not."""
    whole = Noise(seed).exponentials(position, V)
    ids = np.array(tokens, np.intp)
    assert np.array_equal(Noise(seed).exponentials(position, V, ids), whole[ids])
    many = np.concatenate((ids, np.arange(V)))
    assert np.array_equal(Noise(seed).exponentials(position, V, many), whole[many])


def test_every_name_has_numbers_of_its_own() -> None:
    drawn = [
        tuple(Noise(seed, index).exponentials(position, 8, stream=stream))
        for seed, index, position, stream in itertools.product(
            (0, 1, 2**63 - 1), (0, 1), (0, 1, 2**40), Stream
        )
    ]
    numbers = [x for row in drawn for x in row]
    assert len(set(numbers)) == len(numbers)
    again = Noise(1, 1).exponentials(2**40, 8, stream=Stream.DRAFT)
    assert tuple(again) in drawn


def test_numbers_are_exponential_and_uniform() -> None:
    waits = np.sort(np.concatenate([Noise(5).exponentials(p, 1000) for p in range(20)]))
    expected = 1 - np.exp(-waits)
    # Kolmogorov-Smirnov at one in a million.
    assert np.abs(expected - np.arange(1, 20_001) / 20_000).max() < 2.7 / 20_000**0.5
    uniforms = np.sort([Noise(5).uniform(p, Stream.ACCEPT) for p in range(5000)])
    assert np.abs(uniforms - np.arange(1, 5001) / 5000).max() < 2.7 / 5000**0.5


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    temperature=st.sampled_from([1e-300, 0.1, 1.0, 2.0, 1e300]),
    size=st.sampled_from([1, 7, 8192, 8193, 20_000]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_the_race_is_the_argmax_over_everyone(
    seed: int, spread: float, temperature: float, size: int, dtype: type
) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal(size) * spread + 5).astype(dtype)
    logits[random.random(size) < 0.2] = -np.inf
    logits[seed % size] = 5
    noise = Noise(seed)
    with np.errstate(over="ignore"):
        scores = (logits.astype(np.float64) - logits.max()) / temperature
    scores -= np.log(noise.exponentials(3, size))
    assert noise.race(3, logits, temperature) == scores.argmax()


def test_fresh_seeds_differ_and_are_seeds() -> None:
    seeds = {fresh_seed() for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_extreme_seeds(seed: int) -> None:
    assert np.isfinite(Noise(seed, 10**6).exponentials(10**6, 5)).all()
