"""From logits to a token: the distribution, draws from it, and what is reported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.inference.errors import RequestError
from ziphius.inference.noise import Noise
from ziphius.inference.params import SamplingParams
from ziphius.inference.sampler import Sampled, Sampler, top_p

VALUES = st.floats(-20, 20, width=32) | st.sampled_from([0.0, 1.0, 2.0])
LOGITS = st.lists(VALUES, min_size=1, max_size=12)


def sampler(
    *, prompt: Sequence[int] = (), stop_ids: Sequence[int] = (), index: int = 0, **params: Any
) -> Sampler:
    settings_ = SamplingParams(**params)
    return Sampler(settings_, prompt, Noise(settings_.seed or 0, index), stop_ids=stop_ids)


def p(logits: Sequence[float], output: Sequence[int] = (), **params: Any) -> list[float]:
    row = torch.tensor(logits, dtype=torch.float32)
    return sampler(**params).distribution(row, output).tolist()


def reference(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Filter one token at a time, in the stated order, with nothing of the package."""
    largest_logit = max(logits)
    weights = {
        i: math.exp(max((x - largest_logit) / params.temperature, -1e3))
        for i, x in enumerate(logits)
    }
    best = max(weights.values())
    weights = {i: w for i, w in weights.items() if w >= params.min_p * best}
    order = sorted(weights, key=lambda i: (-logits[i], i))
    if params.top_k:
        order = order[: params.top_k]
    # Logits 1e-19 apart have one weight, and top-p then takes the lower token first.
    order.sort(key=lambda i: (-weights[i], i))
    total, kept = sum(weights[i] for i in order), []
    for token in order:
        if sum(weights[i] for i in kept) >= params.top_p * total:
            break
        kept.append(token)
    final = sum(weights[i] for i in kept)
    return [weights[i] / final if i in kept else 0.0 for i in range(len(logits))]


FILTERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.1, 0.7, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 3, 40]),
        "top_p": st.sampled_from([0.0301, 0.513, 0.9017, 1.0]),
        "min_p": st.sampled_from([0.0, 0.0103, 0.307, 1.0]),
    }
)


# --- the distribution -----------------------------------------------------------------------------


@settings(max_examples=300)
@given(LOGITS, FILTERS)
@example([1e-19, 5e-19], {"temperature": 1.0, "top_k": 0, "top_p": 0.513, "min_p": 0.0})
@example([1e-19, 5e-19], {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0})
def test_the_distribution_is_the_reference(logits: list[float], filters: dict[str, Any]) -> None:
    expected = reference([float(np.float32(x)) for x in logits], SamplingParams(**filters))
    assert p(logits, **filters) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([500, 9000]), FILTERS)
def test_the_distribution_of_a_long_row_is_the_reference(
    seed: int, size: int, filters: dict[str, Any]
) -> None:
    row = np.random.default_rng(seed).standard_normal(size) * 5
    row[row < -6] = -np.inf
    result = sampler(**filters).distribution(row, ())
    # The reference's inner sum is too slow for thousands of kept tokens: leave out top-p here.
    if filters["top_p"] < 1:
        before = sampler(**{**filters, "top_p": 1.0}).distribution(row, ())
        order = sorted(range(size), key=lambda i: (-row[i], i))
        count = int(np.searchsorted(np.cumsum(before[order]), filters["top_p"])) + 1
        expected = np.zeros(size)
        expected[order[:count]] = before[order[:count]]
        expected /= expected.sum()
    else:
        expected = np.array(reference(row.tolist(), SamplingParams(**filters)))
    assert result == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100)
@given(LOGITS, st.floats(0.01, 0.999))
@example([0.0] * 10, 0.5)
def test_top_p_keeps_the_smallest_sufficient_set(logits: list[float], share: float) -> None:
    whole = p(logits)
    kept = p(logits, top_p=share)
    chosen = [i for i, part in enumerate(kept) if part > 0]
    assert chosen
    dropped = [whole[i] for i in range(len(whole)) if i not in chosen]
    assert min(whole[i] for i in chosen) >= max(dropped, default=0)
    total = sum(whole[i] for i in chosen)
    assert total >= share - 1e-9
    assert total - min(whole[i] for i in chosen) < share + 1e-9, "a smaller set would do"
    assert sum(kept) == pytest.approx(1)
    for i in chosen:
        assert kept[i] == pytest.approx(whole[i] / total)


def test_top_p_by_hand() -> None:
    logits = [math.log(x) for x in (0.1, 0.5, 0.15, 0.25)]
    assert p(logits, top_p=0.4999) == pytest.approx([0, 1, 0, 0])
    assert p(logits, top_p=0.6) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert p(logits, top_p=0.76) == pytest.approx([0, 5 / 9, 1.5 / 9, 2.5 / 9])
    assert p(logits, top_p=1e-9) == pytest.approx([0, 1, 0, 0])
    # Of equal tokens the lower ids are kept; beyond the sum, as rounding may have it, all.
    assert top_p(np.zeros(5), 0.6).tolist() == [0, 1, 2]
    assert top_p(np.zeros(5), 1 - 2**-53).tolist() == [0, 1, 2, 3, 4]
    assert top_p(np.array([0.0, -np.inf, -1e9]), 0.5).tolist() == [0]


def test_equal_tokens_are_kept_by_id() -> None:
    assert p([1.0, 2.0, 1.0, 2.0, 1.0], top_k=3)[4] == 0
    assert [share > 0 for share in p([1.0, 2.0, 1.0, 2.0, 1.0], top_k=3)] == [1, 1, 0, 1, 0]
    assert p([3.0, 3.0], top_k=1) == [1, 0]
    assert p([3.0, 3.0], temperature=0) == [1, 0]


@pytest.mark.parametrize("temperature", [1e-310, 5e-324, 1e300])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.999}, {"min_p": 1e-9}, {"top_k": 4}])
def test_extreme_temperatures_give_a_distribution(temperature: float, filters: Any) -> None:
    shares = p([1.0, 300.0, -300.0, 299.0], temperature=temperature, **filters)
    expected = [0, 1, 0, 0] if temperature < 1 else [0.25] * 4
    assert shares == pytest.approx(expected)
    row = torch.tensor([1.0, 300.0, -300.0, 299.0])
    assert temperature > 1 or sampler(temperature=temperature, **filters).choose(row, ()).token == 1


def test_bfloat16_logits_are_sampled_in_float64() -> None:
    result = sampler(temperature=0.7).distribution(torch.randn(20).bfloat16(), ())
    assert result.dtype == np.float64
    assert result.sum() == pytest.approx(1, abs=1e-12)


# --- draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.7},
        {"temperature": 0.6, "top_k": 7},
        {"top_p": 0.95},
        {"min_p": 0.05, "temperature": 1.3},
        {"temperature": 1.2, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
        {"logit_bias": {3: 2.0}, "presence_penalty": 1.0, "repetition_penalty": 1.5},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square against the slow reference, one in ten thousand."""
    logits = np.random.default_rng(3).standard_normal(12).astype(np.float32)
    output_token, N = 4, 6000
    chooser = sampler(prompt=[1], seed=11, **params)
    drawn = Counter(
        # One position each: the numbers of different positions are independent.
        chooser.choose(logits, [output_token] * position).token
        for position in range(1, N + 1)
    )
    changed = logits.astype(np.float64)
    if "logit_bias" in params:
        changed[3] += 2
        for seen in (1, output_token):
            changed[seen] = changed[seen] / 1.5 if changed[seen] > 0 else changed[seen] * 1.5
        changed[output_token] -= 1
    expected = np.array(reference(changed.tolist(), SamplingParams(**params))) * N
    assert not [token for token in drawn if expected[token] == 0]
    kept = expected > 0
    counts = np.array([drawn[token] for token in range(12)])
    chi = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert freedom >= 2
    # Wilson and Hilferty's approximation of the quantile at 3.72 standard deviations.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi < limit


@settings(max_examples=80)
@given(LOGITS, FILTERS, st.integers(0, 50))
def test_a_draw_is_possible_and_repeats(
    logits: list[float], filters: dict[str, Any], position: int
) -> None:
    row, output = np.array(logits, np.float32), [0] * position
    chooser = sampler(seed=5, **filters)
    token = chooser.choose(row, output).token
    assert chooser.distribution(row, output)[token] > 0
    sampler(seed=5, **filters).choose(row, [0] * 7)  # the order of work does not matter
    assert chooser.choose(torch.tensor(row), output).token == token
    assert sampler(seed=5, **filters).choose(row.astype(np.float64), output).token == token


def test_filters_that_keep_all_change_no_token() -> None:
    """Noise belongs to a token, so a filter changes a choice only by removing it."""
    row = np.random.default_rng(0).standard_normal(1000)
    plain = sampler(seed=1)
    for position in range(50):
        output = [0] * position
        token = plain.choose(row, output).token
        kept = sampler(seed=1, top_k=990, min_p=1e-6, top_p=1 - 1e-6)
        assert kept.choose(row, output).token == token
        few = sampler(seed=1, top_k=20)
        if few.distribution(row, output)[token]:
            assert few.choose(row, output).token == token


def test_seeds_answers_and_positions_differ() -> None:
    row = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    runs = [
        tuple(sampler(seed=seed, index=index).choose(row, [0] * n).token for n in range(20))
        for seed, index in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert runs[0] == runs[1]
    assert len(set(runs)) == 3
    assert len(set(runs[0])) > 10


def test_greedy_takes_the_largest_and_the_lowest_of_equals() -> None:
    row = torch.tensor([0.0, 3.0, 1.0, 3.0])
    assert sampler(temperature=0).choose(row, ()) == Sampled(1)
    assert sampler(temperature=0, top_k=2, seed=3).choose(row, [1, 2]) == Sampled(1)


def test_nothing_global_is_drawn_or_changed() -> None:
    state, row = torch.get_rng_state(), torch.randn(9)
    torch.set_rng_state(state)
    before = row.clone()
    sampler(logit_bias={0: 1.0}, repetition_penalty=2.0, prompt=[1]).choose(row, [2])
    assert torch.equal(row, before)
    assert torch.equal(torch.get_rng_state(), state)


# --- what a request changes -----------------------------------------------------------------------


def test_the_order_of_changes() -> None:
    """Bias before the repetition penalty: -1 + 3 is positive, so it is divided."""
    chooser = sampler(
        temperature=1,
        prompt=[0],
        logit_bias={0: 3.0},
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    changed = chooser.distribution(np.array([-1.0, 0.0, 0.0]), [0, 0, 2])
    logits = np.array([(-1 + 3) / 2 - 0.5 - 2 * 0.25, 0.0, 0 * 2 - 0.5 - 0.25])
    assert changed == pytest.approx(np.exp(logits) / np.exp(logits).sum())


def test_the_prompt_counts_for_repetition_only() -> None:
    row = np.array([1.0, 1.0])
    other = sampler(prompt=[0], presence_penalty=1.0, frequency_penalty=1.0)
    assert other.distribution(row, ()).tolist() == [0.5, 0.5]
    repeated = sampler(prompt=[0], repetition_penalty=2.0).distribution(row, ())
    assert repeated[0] < repeated[1]


def test_allowed_banned_and_a_mask() -> None:
    row = np.array([5.0, 4.0, 3.0, 2.0, 1.0], np.float32)
    chooser = sampler(temperature=0, allowed_token_ids=[1, 2, 3], banned_token_ids=[1])
    assert chooser.choose(row, ()).token == 2
    mask = np.array([True, True, False, True, True])
    assert chooser.choose(row, (), allowed_V=mask).token == 3
    assert chooser.distribution(row, (), allowed_V=mask).tolist() == [0, 0, 0, 1, 0]


def test_stop_ids_wait_for_min_tokens() -> None:
    row = np.array([5.0, 4.0, 3.0])
    early = sampler(temperature=0, min_tokens=2, stop_token_ids=[1], stop_ids=[0])
    assert [early.choose(row, [2] * n).token for n in range(4)] == [2, 2, 0, 0]
    ignoring = sampler(
        temperature=0, min_tokens=2, stop_token_ids=[1], stop_ids=[0], ignore_eos=True
    )
    assert ignoring.choose(row, ()).token == 0
    assert ignoring.stop_ids == {1}


def test_bad_words_need_a_tokenizer() -> None:
    with pytest.raises(BadInput, match="bad_words need a tokenizer"):
        sampler(bad_words=["x"])


# --- what is reported -----------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    row = torch.tensor([0.0, 3.0, 1.0, 2.0])
    expected = row.double().log_softmax(0)
    chooser = sampler(temperature=0, logprobs=2, banned_token_ids=[1], logit_bias={0: 9.0})
    chosen = chooser.choose(row, ())
    assert (chosen.token, chosen.rank) == (0, 4)
    assert chosen.logprob == pytest.approx(expected[0].item())
    assert [(a.token, a.rank) for a in chosen.top] == [(1, 1), (3, 2)]
    assert [a.logprob for a in chosen.top] == pytest.approx(expected[[1, 3]].tolist())
    assert sampler(temperature=0, logprobs=0).choose(row, ()).top == ()
    assert len(sampler(logprobs=-1).choose(row, ()).top) == 4


# --- rows that cannot be chosen from --------------------------------------------------------------

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("row", "params", "expected"),
    [
        ([0.0, NAN, 1.0], {}, "output position 2 hold NaN or infinity"),
        ([0.0, INF, 1.0], {}, "hold NaN or infinity"),
        ([NAN, NAN, NAN], {}, "hold NaN or infinity"),
        ([0.0, NAN, 1.0], {"allowed_token_ids": [0]}, "hold NaN or infinity"),
        ([0.0, INF, 1.0], {"banned_token_ids": [1]}, "hold NaN or infinity"),
        ([-INF, -INF, -INF], {}, "all minus infinity"),
        ([0.0, -INF, -INF], {"banned_token_ids": [0]}, "no token is left to choose"),
        ([0.0, 1.0, 2.0], {"allowed_token_ids": [1], "banned_token_ids": [1]}, "no token is left"),
        ([1.0, 1.0, 1.0], {"repetition_penalty": 5e-324}, "overflow: use milder"),
    ],
)
def test_bad_rows_end_the_request(
    temperature: float, row: list[float], params: Any, expected: str
) -> None:
    chooser = sampler(temperature=temperature, prompt=[0], **params)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(RequestError, match=expected) as error:
            chooser.choose(torch.tensor(row, dtype=dtype), [0, 0])
        assert "\n" not in str(error.value)
        with pytest.raises(RequestError, match=expected):
            chooser.distribution(torch.tensor(row, dtype=dtype), [0, 0])
    assert issubclass(RequestError, ZiphiusError)


def test_minus_infinity_among_others_is_fine() -> None:
    row = torch.tensor([-INF, 0.0, -INF])
    assert sampler(temperature=0).choose(row, ()).token == 1
    assert sampler().choose(row, ()).token == 1
    assert sampler(top_p=0.9).distribution(row, ()).tolist() == [0, 1, 0]
