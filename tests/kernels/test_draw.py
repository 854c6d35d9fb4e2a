"""The compiled choice of tokens is the sampler's own, written out in numpy; and knows no others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ziphius.inference.logprobs import log_sum_exp, score
from ziphius.inference.noise import Noise
from ziphius.kernels.cpu.library import Library
from ziphius.kernels.draw import Draw, Name


@pytest.fixture(scope="module")
def draw(library: Library) -> Draw:
    return Draw(library)


def rows_of(seed: int, count: int, width: int, spread: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    rows_RV = (random.standard_normal((count, width)) * spread + 5).astype(np.float32)
    rows_RV[random.random((count, width)) < 0.2] = -np.inf
    rows_RV[:, seed % width] = 5
    return rows_RV


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=3, max_size=3),
    position=st.integers(0, 2**40),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    temperature=st.sampled_from([0.0, 1e-300, 0.1, 1.0, 2.0, 1e300]),
    width=st.sampled_from([1, 3, 7, 255, 256, 257, 3000]),
)
def test_tokens_are_those_of_the_race(
    draw: Draw,
    seed: int,
    seeds: list[int],
    position: int,
    spread: float,
    temperature: float,
    width: int,
) -> None:
    rows_RV = rows_of(seed, 3, width, spread)
    names = [Name(one, position + n, n) for n, one in enumerate(seeds)]
    found = draw.tokens(torch.from_numpy(rows_RV), range(3), names, [temperature] * 3)
    for row_V, name, token in zip(rows_RV, names, found, strict=True):
        noise = Noise(name.seed, name.answer)
        wanted = noise.race(name.position, row_V, temperature) if temperature else row_V.argmax()
        assert token == wanted


@pytest.mark.parametrize("width", [1, 5, 1000, 129_280])
@pytest.mark.parametrize("spread", [0.0, 3.0, 300.0])
def test_sums_and_ranks_are_those_of_the_softmax(draw: Draw, width: int, spread: float) -> None:
    rows_RV = rows_of(width, 4, width, spread)
    rows_RV[2] = rows_RV[2].round()  # many are equal
    tokens = np.array([width // 3, width - 1, width // 2, 0])
    sums, ranks = draw.log_sums(torch.from_numpy(rows_RV), range(4), tokens)
    exact = [torch.from_numpy(row_V).double().logsumexp(0).item() for row_V in rows_RV]
    np.testing.assert_allclose(sums, exact, rtol=1e-14, atol=1e-13)
    np.testing.assert_allclose(sums, [log_sum_exp(row_V) for row_V in rows_RV], rtol=1e-14)
    plain = [score(row_V, int(t), 0).rank for row_V, t in zip(rows_RV, tokens, strict=True)]
    assert ranks.tolist() == plain


def test_the_sum_is_right_however_far_apart_the_numbers_are(draw: Draw) -> None:
    rows_RV = torch.tensor([[1e30, -torch.inf], [-1e4, -1e4], [3.0, 3.0 - 750], [0.0, -36.5]])
    sums, _ = draw.log_sums(rows_RV, range(4), np.zeros(4, np.int64))
    exact = [float(np.float32(1e30)), -1e4 + np.log(2), 3.0, np.log1p(np.exp(-36.5))]
    np.testing.assert_allclose(sums, exact, rtol=1e-15, atol=1e-15)


def test_rows_without_a_largest_number_have_no_token(draw: Draw) -> None:
    nan, inf = torch.nan, torch.inf
    rows_RV = torch.tensor([[1.0, nan], [nan, 1.0], [inf, 1.0], [-inf, -inf], [-inf, 1.0]])
    names = [Name(n, 0, 0) for n in range(5)]
    for temperature in (0.0, 1.0):
        found = draw.tokens(rows_RV, range(5), names, [temperature] * 5)
        assert found.tolist() == [-1, -1, -1, -1, 1]


def test_a_row_is_the_same_alone_and_among_others(draw: Draw) -> None:
    rows_RV = torch.from_numpy(rows_of(1, 33, 4099, 2.0))
    memory_V = torch.empty(4100)
    names = [Name(9, n, 1) for n in range(33)]
    chosen = list(reversed(range(33)))
    together = draw.tokens(rows_RV, chosen, [names[n] for n in chosen], [1.0] * 33)
    sums, ranks = draw.log_sums(rows_RV, chosen, together)
    for place, n in enumerate(chosen):
        for offset in (0, 1):  # whatever the address
            alone_1V = memory_V[offset : offset + 4099].copy_(rows_RV[n]).unsqueeze(0)
            token = draw.tokens(alone_1V, [0], [names[n]], [1.0])
            sum_alone, rank_alone = draw.log_sums(alone_1V, [0], token)
            among = (together[place], sums[place], ranks[place])
            assert (token[0], sum_alone[0], rank_alone[0]) == among


def test_tokens_come_as_often_as_the_softmax_says(draw: Draw) -> None:
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf])
    names = [Name(7, n, 0) for n in range(40_000)]
    found = draw.tokens(logits_V.unsqueeze(0), [0] * len(names), names, [1.5] * len(names))
    shares = np.bincount(found, minlength=5) / len(names)
    expected = torch.softmax(logits_V / 1.5, 0).numpy()
    assert shares[4] == 0
    # Five deviations of a share, which is at most half a root of the number of draws.
    assert np.abs(shares - expected).max() < 2.5 / len(names) ** 0.5
