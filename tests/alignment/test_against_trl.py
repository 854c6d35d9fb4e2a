"""Losses, gradients and advantages are those that trl has given of the same tensors.

``make test-trl`` makes the file anew with trl's newest release, in an environment of its own.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.alignment.against_trl import Case, check, checks

VECTORS = Path(__file__).parent / "data" / "trl.json"


def vectors() -> dict[str, Any]:
    return json.loads(VECTORS.read_text("utf-8"))


CASES = [(kind, n) for kind in checks() for n in range(len(vectors()[kind]))]


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_ours_are_those_of_trl(kind: str, number: int) -> None:
    checks()[kind](vectors()[kind][number])


def test_the_file_says_where_it_comes_from() -> None:
    told = vectors()
    assert told["versions"].keys() == {"trl", "torch", "transformers"}
    assert told["command"].startswith("python -m tests.trl")
    forms = {(case["form"], case["kl_weight"] > 0) for case in told["policy"]}
    assert len(forms) == 6
    assert {case["scale"] for case in told["advantages"]} == {"group", "none"}


@pytest.mark.parametrize("kind", ["policy", "preference", "pairs"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_file_that_differs_is_noticed(kind: str, what: str) -> None:
    other = copy.deepcopy(vectors())
    case: Case = other[kind][0]
    if what == "loss":
        other[kind][0]["loss"] *= 1.0001
    else:
        first = case["gradient"][0]
        place, index = (first, 0) if isinstance(first, list) else (case["gradient"], 0)
        place[index] += 1e-4
    with pytest.raises(AssertionError):
        check(other)
