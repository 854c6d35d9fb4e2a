"""Bubble and activations as the report's table 2 has them, beside what the tables themselves give.

With F, I and W the times of a forward, a backward for the input and one for the weights, the
formulas hold, and tests hold the simulation to them, where

- 1F1B and interleaved 1F1B: always;
- ZB1P: W is longer than neither F nor I, so that it fits where the rank would be idle, and there is
  a micro-batch for every rank;
- DualPipe and DualPipeV: F = I = W, whatever a pair takes, up to the sum of its parts.

For other times those of DualPipe are an estimate, too high or too low: how long ranks wait in the
eight steps depends on which time is the longest. Plans use the simulation.
"""

from __future__ import annotations

from typing import NamedTuple

from ziphius.parallel.pipeline.actions import Schedule
from ziphius.parallel.pipeline.simulate import Times, simulate


class Row(NamedTuple):
    """A line of table 2: the formulas' values and those of the table of actions."""

    name: str
    bubble_formula: float | None
    bubble: float  # the largest of any rank
    peak_formula: int | None
    peak: int  # activations of so many (stage, micro-batch) on the fullest rank
    total: float

    def __str__(self) -> str:
        return (
            f"{self.name}: bubble {self.bubble:.6g} (formula {_or_none(self.bubble_formula)}), "
            f"activations {self.peak} (formula {_or_none(self.peak_formula)}), "
            f"step {self.total:.6g}"
        )


def bubble_formula(schedule: Schedule, times: Times) -> float | None:
    """Return how long a rank does not compute, by table 2; None where it has no formula.

    Interleaved 1F1B is not in the table: it has the formula of 1F1B with its smaller stages, for at
    least one micro-batch a rank.
    """
    forward, backward, weight, pair = times.forward, times.backward, times.weight, times.pair
    match schedule.name:
        case "1f1b" | "interleaved":
            return (schedule.ranks - 1) * (forward + backward)
        case "zb1p":
            return (schedule.ranks - 1) * (forward + backward - 2 * weight)
        case "dualpipe" | "dualpipev":
            return (schedule.stages / 2 - 1) * (pair + backward - 3 * weight)
    return None


def peak_formula(schedule: Schedule) -> int | None:
    """Return of how many (stage, micro-batch) a rank holds activations, by table 2."""
    return {
        "1f1b": schedule.stages,
        "zb1p": schedule.stages,
        "dualpipe": schedule.stages + 1,
        "dualpipev": schedule.stages + 1,
    }.get(schedule.name)


def compare(schedule: Schedule, times: Times) -> Row:
    """Return formulas and simulation of one schedule side by side; ``str`` makes a line of it."""
    timeline = simulate(schedule, times)
    ranks = range(schedule.ranks)
    return Row(
        schedule.name,
        bubble_formula(schedule, times),
        max(timeline.bubble(rank) for rank in ranks),
        peak_formula(schedule),
        max(schedule.peak_live(rank) for rank in ranks),
        timeline.total,
    )


def _or_none(number: float | None) -> str:
    return "none" if number is None else f"{number:.6g}"
