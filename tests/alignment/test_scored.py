"""Judged answers from JSON lines: what a sample is, where its score is read, and wrong lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ziphius.alignment.packing import packed_rows
from ziphius.alignment.records import Sample
from ziphius.alignment.scored import (
    READ,
    WORTH,
    ScoredSample,
    lay_scored,
    read_judged,
    units_of,
)
from ziphius.config.errors import BadInput
from ziphius.config.reward import RewardConfig
from ziphius.data.rows import LEARNED
from ziphius.data.tokenizer import EOS, train_tokenizer

PAIR = {"prompt": "how", "chosen": "fine", "rejected": "and"}
SAFE = {"prompt": "how", "response": "fine", "label": 1}
GOOD = {"prompt": "how", "response": "fine", "score": 2.5}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["how are you", "fine, thanks", "and then"], 300)


def units(tmp_path: Path, tokenizer: Tokenizer, kind: str, *lines: object, **settings: Any):
    file = tmp_path / "judged.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")
    judged, _ = read_judged([file], kind)
    config = RewardConfig(**{"kind": kind, "sequence_length": 200, "steps": 1, **settings})
    found, dropped = units_of(judged, config, tokenizer)
    return found, dropped.describe()


def spelled(tokenizer: Tokenizer, sample: Sample, *, learned: bool = False) -> str:
    tokens = sample.tokens[sample.learned] if learned else sample.tokens
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def test_an_answer_is_scored_at_its_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (unit, *_), _ = units(tmp_path, tokenizer, "pairwise", PAIR)
    assert [spelled(tokenizer, s).rpartition("</think>")[2] for s in unit] == [
        f"fine{EOS}",
        f"and{EOS}",
    ]
    assert not any(sample.learned.any() for sample in unit)


def test_reasoning_stands_before_the_score_and_is_learned(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    line = {**PAIR, "reasoning": {"chosen": "fine is fine", "rejected": "and what"}}
    ((chosen, rejected),), _ = units(tmp_path, tokenizer, "pairwise", line)
    assert spelled(tokenizer, chosen).endswith(f"fine{EOS}<think>fine is fine</think>")
    assert spelled(tokenizer, chosen, learned=True) == "fine is fine</think>"
    assert spelled(tokenizer, rejected, learned=True) == "and what</think>"


@pytest.mark.parametrize(
    ("kind", "line", "worth"),
    [("binary", SAFE, 1.0), ("binary", {**SAFE, "label": False}, 0.0), ("regression", GOOD, 2.5)],
)
def test_single_answers_have_their_worth(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, line: object, worth: float
) -> None:
    ((sample,),), _ = units(tmp_path, tokenizer, kind, line)
    assert isinstance(sample, ScoredSample)
    assert sample.worth == worth


def test_samples_of_other_worth_are_others() -> None:
    one, other = (ScoredSample(*_sample(3), worth=w) for w in (0.0, 1.0))
    assert one.content() != other.content()


def _sample(length: int):
    import numpy as np

    return np.arange(length, dtype=np.int32), np.zeros(length, np.bool_)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_every_score_is_read_once_at_an_input(lengths: list[int]) -> None:
    units = [[ScoredSample(*_sample(n), worth=float(place))] for place, n in enumerate(lengths)]
    batch = lay_scored(packed_rows(units, 9), 10)
    read_BS = batch.fields[READ]
    assert int(read_BS.sum()) == len(lengths)
    assert not read_BS[:, -1].any(), "the last token of a row is no input"
    assert sorted(batch.fields[WORTH][read_BS].tolist()) == list(range(len(lengths)))
    # The last token of a document: what follows is of another one.
    documents_BS = batch.documents_BS
    assert (documents_BS[:, :-1] != documents_BS[:, 1:])[read_BS[:, :-1]].all()
    assert not batch.fields[LEARNED].any()


def test_what_teaches_nothing_is_dropped_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = (PAIR, {**PAIR, "chosen": ""}, {**PAIR, "rejected": "fine"})
    lines = (*lines, {**PAIR, "rejected": "and " * 300})
    found, dropped = units(tmp_path, tokenizer, "pairwise", *lines)
    assert len(found) == 1
    assert dropped == {"empty": 1, "too_long": 1, "same": 1}


@pytest.mark.parametrize(
    ("kind", "line", "says"),
    [
        ("binary", {"prompt": "how", "response": "fine"}, "label = None: give 0 or 1"),
        ("binary", {**SAFE, "label": 2}, "label = 2"),
        ("binary", {**SAFE, "label": "yes"}, "label = 'yes'"),
        ("regression", SAFE, "score = None: give a number"),
        ("regression", {**GOOD, "score": float("nan")}, "score = nan"),
        ("regression", {**GOOD, "reasoning": 3}, "reasoning: give text"),
        ("regression", {**GOOD, "reasoning": "so</think>"}, "without </think>"),
        ("regression", {**GOOD, "reasoning": "so"}, "give it to all or to none"),
        ("pairwise", {**PAIR, "reasoning": "so"}, "an object with 'chosen' and 'rejected'"),
        ("pairwise", {**PAIR, "reasoning": {"chosen": "so"}}, "an object with 'chosen'"),
        ("pairwise", SAFE, "chosen: give a text"),
        (
            "binary",
            {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
            "must be the assistant's",
        ),
    ],
)
def test_a_wrong_line_is_named(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, line: object, says: str
) -> None:
    good = {"pairwise": PAIR, "binary": SAFE, "regression": GOOD}[kind]
    with pytest.raises(BadInput, match=r"judged\.jsonl: line 2.*") as caught:
        units(tmp_path, tokenizer, kind, good, line)
    assert says in str(caught.value)
