"""Preference pairs: read strictly, scored by subset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.alignment.rewards.judges import fake_judge, shown
from ziphius.alignment.endpoint import Endpoint
from ziphius.alignment.rewards.judge import Judge
from ziphius.alignment.rewards.pairs import (
    Pair,
    by_choice,
    by_grade,
    read_pairs,
    score_pairs,
)
from ziphius.config.errors import BadInput

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r", "subset": "s"}


def test_pairs_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    plain = {name: value for name, value in GOOD.items() if name != "subset"}
    extra = {**GOOD, "id": 7, "prompt": "line\u2028break"}
    path.write_text("\n".join(map(json.dumps, (GOOD, plain))) + "\n\n" + json.dumps(extra))
    assert read_pairs(path) == [
        Pair("p", "c", "r", "s"),
        Pair("p", "c", "r", "all"),
        Pair("line\u2028break", "c", "r", "s"),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is no JSON: "),
        ("[]", "is no JSON object"),
        (json.dumps({**GOOD, "chosen": ""}), "field 'chosen' is missing or no text"),
        (json.dumps({**GOOD, "rejected": ["r"]}), "field 'rejected' is missing or no text"),
        (json.dumps({"prompt": "p", "chosen": "c"}), "field 'rejected' is missing"),
        (json.dumps({**GOOD, "subset": None}), "field 'subset' is missing or no text"),
        ("[" * 100_000, "is no JSON: "),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(BadInput) as info:
        read_pairs(path)
    assert str(info.value).startswith(f"{path}: line 2: {words}")


def test_files_without_pairs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(BadInput, match="has no pairs"):
        read_pairs(tmp_path / "empty")
    with pytest.raises(BadInput, match="cannot be read"):
        read_pairs(tmp_path / "absent")


def test_accuracy_is_by_subset_and_their_mean() -> None:
    pairs = [Pair("p", str(i), "", "easy" if i < 3 else "hard") for i in range(5)]
    verdicts = {"0": 1.0, "1": 1.0, "2": 0.5, "3": 0.0, "4": None}
    scores = score_pairs(pairs, lambda pair: verdicts[pair.chosen])
    assert scores.accuracy == {"easy": pytest.approx(2.5 / 3), "hard": 0.0}
    assert scores.pairs == {"easy": 3, "hard": 2}
    assert scores.abstained == 1
    assert scores.mean == pytest.approx(2.5 / 6)


def test_grades_order_pairs() -> None:
    prefers = by_grade(lambda prompt, answer: len(answer))
    assert [prefers(Pair("p", *two)) for two in (("ab", "a"), ("a", "ab"), ("a", "b"))] == [
        1,
        0,
        0.5,
    ]


def test_a_judge_is_scored_whatever_order_it_sees() -> None:
    def prefers_longer(body: dict[str, object]) -> str:
        a, b = shown(body)
        if "broken" in a + b:
            return "no verdict"
        return "[[C]]" if len(a) == len(b) else f"[[{'AB'[len(a) < len(b)]}]]"

    pairs = [Pair(f"q{i}", "longer", "short") for i in range(8)]
    pairs += [Pair("q", "no", "longer", "adverse"), Pair("q", "same", "even", "adverse")]
    pairs += [Pair("q", "broken", "x", "broken")]
    with (
        fake_judge(prefers_longer) as fake,
        Judge(Endpoint(fake.url, "m", seconds=10), votes=3) as judge,
    ):
        scores = score_pairs(pairs, by_choice(judge))
    assert scores.accuracy == {"all": 1.0, "adverse": 0.25, "broken": 0.0}
    assert scores.abstained == 1
