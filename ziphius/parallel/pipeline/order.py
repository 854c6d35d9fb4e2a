"""Running a table without doing anything: which step can begin after which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ziphius.parallel.pipeline.actions import Action, Schedule, Step


class Turn(NamedTuple):
    """A step of a rank, by its place in the rank's list."""

    rank: int
    place: int
    step: Step


class Stuck(NamedTuple):
    """A rank that stands before a step for ever, because nobody will make what it needs."""

    turn: Turn
    missing: tuple[Action, ...]


def in_order(schedule: Schedule, stuck: list[Stuck] | None = None) -> Iterator[Turn]:
    """Yield the steps so that each comes after all that it needs and after its rank's former ones.

    Receives block, sends do not. Where ranks wait for each other, or for what no step makes, the
    steps that could run are yielded and each waiting rank is added to ``stuck``.
    """
    made: set[Action] = set()
    next_place = [0] * schedule.ranks
    waiting: dict[Action, list[int]] = {}  # which ranks a result will wake
    ready = list(range(schedule.ranks))
    while ready:
        rank = ready.pop()
        while next_place[rank] < len(schedule.steps[rank]):
            turn = Turn(rank, next_place[rank], schedule.steps[rank][next_place[rank]])
            missing = [need for need in schedule.needs(turn.step) if need not in made]
            if missing:
                waiting.setdefault(missing[0], []).append(rank)
                break
            yield turn
            next_place[rank] += 1
            made.update(turn.step.results)
            for result in turn.step.results:
                ready += waiting.pop(result, [])
    if stuck is not None:
        stuck += _stuck(schedule, next_place, made)


def _stuck(schedule: Schedule, next_place: list[int], made: set[Action]) -> Iterator[Stuck]:
    for rank, place in enumerate(next_place):
        if place < len(schedule.steps[rank]):
            step = schedule.steps[rank][place]
            missing = tuple(need for need in schedule.needs(step) if need not in made)
            yield Stuck(Turn(rank, place, step), missing)
