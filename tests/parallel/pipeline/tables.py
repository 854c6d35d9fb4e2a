"""The tables that the tests of pipelines look at, and what follows from a table by another way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

from hypothesis import strategies as st

from ziphius.parallel.pipeline.actions import Action, Pair, Schedule, Step
from ziphius.parallel.pipeline.families import NAMES, schedule

RANKS = range(2, 17)
ONE_WAY = ("1f1b", "interleaved", "zb1p", "zbv", "dualpipev")
ZERO_BUBBLE = ("zb1p", "zbv", "dualpipev", "dualpipe")


def allowed(name: str, ranks: int, micro_batches: int) -> bool:
    """Say what a schedule takes, as the issue and facts 5.4 and 5.5 say it."""
    if name == "dualpipe":
        return not ranks % 2 and not micro_batches % 2 and micro_batches >= 2 * ranks
    return name != "dualpipev" or micro_batches >= 2 * ranks


def counts(ranks: int) -> list[int]:
    """Return numbers of micro-batches: few, odd ones, multiples and neighbours of multiples."""
    p = ranks
    near = {1, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 2 * p + 2, 3 * p, 3 * p + 1, 4 * p}
    return sorted(near)


def many(name: str) -> Iterator[Schedule]:
    """Yield tables of one name for 2 to 16 ranks and many numbers of micro-batches."""
    for ranks in RANKS:
        for micro_batches in counts(ranks):
            if allowed(name, ranks, micro_batches):
                yield schedule(name, ranks, micro_batches)
            if name == "interleaved" and ranks <= 8:
                yield schedule(name, ranks, micro_batches, 3 * ranks)


@st.composite
def any_schedule(draw: st.DrawFn, names: tuple[str, ...] = NAMES, most: int = 6) -> Schedule:
    """Draw a table of a few ranks."""
    name = draw(st.sampled_from(names))
    ranks = draw(st.integers(2, most))
    micro_batches = draw(st.integers(1, 3 * most))
    if name.startswith("dualpipe"):
        ranks += ranks % 2
        micro_batches = 2 * (micro_batches + ranks)
    stages = ranks * draw(st.integers(2, 4)) if name == "interleaved" else None
    return schedule(name, ranks, micro_batches, stages)


def edit(table: Schedule, rank: int, steps: list[Step]) -> Schedule:
    """Return a table in which one rank has other steps."""
    rows = list(table.steps)
    rows[rank] = tuple(steps)
    return replace(table, steps=tuple(rows))


def graph(table: Schedule) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """Return for every (rank, place) what must have ended: its rank's former step, and its inputs.

    Written from the meaning of a pipeline, not with the methods of the table.
    """
    maker = {
        (kind, action.stage, action.micro_batch): (rank, place)
        for rank, steps in enumerate(table.steps)
        for place, step in enumerate(steps)
        for action in actions_of(step)
        for kind in ("IW" if action.kind == "B" else action.kind)
    }
    edges: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for rank, steps in enumerate(table.steps):
        for place, step in enumerate(steps):
            before = {(rank, place - 1)} if place else set()
            for kind, stage, m in actions_of(step):
                if kind == "F" and stage > 0:
                    before.add(maker["F", stage - 1, m])
                if kind in "BI":
                    before.add(maker["F", stage, m])
                    if stage < table.stages - 1:
                        before.add(maker["I", stage + 1, m])
                if kind == "W":
                    before.add(maker["I", stage, m])
            edges[rank, place] = before
    return edges


def actions_of(step: Step) -> tuple[Action, ...]:
    return (step.forward, step.backward) if isinstance(step, Pair) else (step,)


def runs(table: Schedule) -> bool:
    """Whether nothing waits for itself; KeyError for what nobody makes."""
    try:
        tuple(TopologicalSorter(graph(table)).static_order())
    except CycleError:
        return False
    return True


def phases(table: Schedule, rank: int) -> str:
    """Write a rank's steps with 0 for the stage nearer to the input and 1 for the other: F0&B1."""
    near, far = sorted(chunk.stage for chunk in table.chunks(rank))
    number = {near: 0, far: 1}
    return " ".join(
        "&".join(f"{action.kind}{number[action.stage]}" for action in actions_of(step))
        for step in table.steps[rank]
    )


def step_counts(line: str) -> tuple[int, ...]:
    """Cut a line of ``phases`` into DualPipe's eight steps and count their repetitions."""
    pattern = (
        r"((?:F0 )*?)((?:F0 F1 )*)((?:I1 W. F1 )*)((?:(?:F0&B1|F0 B1) F1&B0 )*)"
        r"((?:B1 F1&B0 )*)((?:[BI]1 [BI]0 )*)((?:W. I0 )*)((?:W. )*)"
    )
    match = re.fullmatch(pattern, line + " ")
    assert match, line
    lengths = (1, 2, 3, (2, 3), 2, 2, 2, 1)
    found = []
    for part, length in zip(match.groups(), lengths, strict=True):
        if isinstance(length, tuple):
            found.append(part.count("F1&B0"))
        else:
            found.append(len(part.split()) // length)
    return tuple(found)
