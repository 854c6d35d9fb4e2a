"""What is kept of every engine, and the figures that follow from it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from support.checkpoints import BITS, GGUF_BITS, Checkpoints, touched_bytes
from support.workers import Worker

MTP = "+mtp"


@dataclass
class Candidate:
    """An engine with its weights in one form: a row of the table."""

    engine: str
    weights: str
    worker: Worker
    variants: dict[str, str] = field(default_factory=dict)
    # Per measure, in order of the rounds.
    speeds: dict[str, list[float]] = field(default_factory=dict)
    batches: dict[str, list[float]] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0

    @property
    def name(self) -> str:
        return f"{self.engine} {self.weights}"

    def speed(self, measure: str) -> float:
        return statistics.median(self.speeds[measure])


def equal(ours: list[int], theirs: list[int]) -> int:
    """Count the leading tokens that are the same."""
    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            return place
    return len(ours)


def ratios(candidates: Sequence[Candidate], measures: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Divide Ziphius by the best peer of equal bits: the median over rounds, and the range."""
    found: dict[str, dict[str, Any]] = {}
    for ours in (c for c in candidates if c.engine == "ziphius"):
        bits = BITS[ours.weights.removesuffix(MTP)]
        peers = [c for c in candidates if c.engine != "ziphius" and BITS[c.weights] == bits]
        for measure in measures if peers else ():
            best = max(peers, key=lambda c: c.speed(measure))
            each = [a / b for a, b in zip(ours.speeds[measure], best.speeds[measure], strict=True)]
            found.setdefault(ours.weights, {})[measure] = {
                "ratio": round(statistics.median(each), 3),
                "range": [round(min(each), 3), round(max(each), 3)],
                "peer": best.name,
            }
    return found


def limits(
    candidates: Sequence[Candidate],
    batches: Mapping[str, int],
    met: Mapping[str, float],
    bandwidth: float,
    made: Checkpoints,
    context: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Bytes touched a token, and the share of what the memory's bandwidth allows.

    ``met`` are the experts that a batch meets in a layer, ``context`` the mean tokens before one.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    if not met:
        return found
    for c in (c for c in candidates if not c.weights.endswith(MTP)):
        gguf = c.engine == "llama.cpp"
        checkpoint = made.form("bf16" if gguf else c.weights)
        bits = GGUF_BITS[c.weights] if gguf else 0
        found[c.name] = {}
        for measure, batch in batches.items():
            touched = touched_bytes(checkpoint, met[measure], batch, context, bits)
            found[c.name][measure] = {
                "mb_a_token": round(touched / 1e6, 1),
                "share": round(c.speed(measure) * touched / bandwidth, 3),
            }
    return found


def figures_of(candidates: Sequence[Candidate], measures: Sequence[str]) -> dict[str, Any]:
    """Return the tokens a second of every engine and its weights, and beside them the details."""
    speeds: dict[str, Any] = {}
    details: dict[str, Any] = {}
    for c in candidates:
        row = {measure: round(c.speed(measure), 1) for measure in measures}
        speeds.setdefault(c.engine, {})[c.weights] = row
        details[c.name] = {
            "range": {m: [round(min(s), 1), round(max(s), 1)] for m, s in c.speeds.items()},
            "batch": {m: round(statistics.mean(b), 2) for m, b in c.batches.items()},
            "variant": c.variants,
        }
        if c.drafted:
            details[c.name]["acceptance"] = round(c.accepted / c.drafted, 4)
    return speeds | {"details": details}
