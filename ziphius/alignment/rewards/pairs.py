"""Preference pairs in RewardBench's form, and how often a judge prefers what people preferred."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziphius.alignment.lines import read_objects
from ziphius.alignment.rewards.judge import Judge
from ziphius.config.errors import BadInput


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers, of which people preferred the first; ``subset`` groups pairs."""

    prompt: str
    chosen: str
    rejected: str
    subset: str = "all"


@dataclass(frozen=True)
class PairScores:
    """Shares of the pairs that were ordered as people do, from 0 to 1.

    A tie counts half, a pair without a verdict 0; ``abstained`` counts the latter. ``mean`` is
    that of the subsets, each counting alike.
    """

    accuracy: Mapping[str, float]
    pairs: Mapping[str, int]
    abstained: int
    mean: float


# 1 where the chosen answer is preferred, 0 where the rejected one is, 0.5 for a tie, None unknown.
Prefers = Callable[[Pair], float | None]


def read_pairs(path: Path) -> list[Pair]:
    """Read a JSONL file of objects with ``prompt``, ``chosen``, ``rejected`` and maybe ``subset``.

    Raises BadInput that names file and line for any other record, and for a file without pairs.
    """
    objects, _ = read_objects([path])
    found = [_pair(record, where) for record, where in objects]
    if not found:
        raise BadInput(f"{path}: has no pairs: give one JSON object a line")
    return found


def _pair(record: Mapping[str, Any], where: str) -> Pair:
    fields: dict[str, Any] = {name: record.get(name) for name in ("prompt", "chosen", "rejected")}
    fields["subset"] = record.get("subset", "all")
    for name, value in fields.items():
        if not isinstance(value, str) or not value.strip():
            raise BadInput(f"{where}: field '{name}' is missing or no text: repair or remove it")
    return Pair(**fields)


def score_pairs(pairs: Sequence[Pair], prefers: Prefers, *, threads: int = 8) -> PairScores:
    """Return how often ``prefers`` agrees with people, by subset in the order of the pairs."""
    if not pairs or threads < 1:
        raise BadInput(f"{len(pairs)} pairs by {threads} threads: give at least one of each")
    with ThreadPoolExecutor(threads) as pool:
        verdicts = list(pool.map(prefers, pairs))
    by_subset: dict[str, list[float]] = defaultdict(list)
    for pair, verdict in zip(pairs, verdicts, strict=True):
        by_subset[pair.subset].append(verdict or 0.0)
    accuracy = {name: math.fsum(values) / len(values) for name, values in by_subset.items()}
    return PairScores(
        accuracy,
        {name: len(values) for name, values in by_subset.items()},
        verdicts.count(None),
        math.fsum(accuracy.values()) / len(accuracy),
    )


def by_choice(judge: Judge) -> Prefers:
    """Let a judge compare the two answers."""
    worth = {"first": 1.0, "second": 0.0, "tie": 0.5}

    def prefers(pair: Pair) -> float | None:
        winner = judge.choose(pair.prompt, pair.chosen, pair.rejected).winner
        return None if winner is None else worth[winner]

    return prefers


def by_grade(grade: Callable[[str, str], float]) -> Prefers:
    """Let anything that grades (prompt, answer) decide: the higher grade is preferred."""

    def prefers(pair: Pair) -> float | None:
        chosen, rejected = (grade(pair.prompt, text) for text in (pair.chosen, pair.rejected))
        return 0.5 if chosen == rejected else float(chosen > rejected)

    return prefers
