"""When each step of a schedule begins and ends, given how long the actions take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ziphius.config.errors import BadInput
from ziphius.parallel.pipeline.actions import Action, Pair, Schedule, Step
from ziphius.parallel.pipeline.order import Stuck, in_order


class Clock(Protocol):
    """How long things take, in any unit: the planner may give every stage its own times."""

    @property
    def message(self) -> float:
        """From the end of a step to the moment that another rank has what it made."""

    def of(self, step: Step) -> float:
        """Return how long a step takes."""


@dataclass(frozen=True)
class Times:
    """One time a kind, the same for all stages.

    ``backward`` is a full one: the backward for the input takes ``backward - weight``. ``pair`` is
    a forward and a full backward that overlap.
    """

    forward: float
    backward: float
    weight: float
    pair: float
    message: float = 0.0

    def of(self, step: Step) -> float:
        """Return how long a step takes."""
        if isinstance(step, Pair):
            return self.pair
        input_only = self.backward - self.weight
        times = {"F": self.forward, "B": self.backward, "I": input_only, "W": self.weight}
        return times[step.kind]


class Box(NamedTuple):
    """A step on its rank's line."""

    rank: int
    start: float
    end: float
    step: Step


class Part(NamedTuple):
    """What a picture writes: kind, micro-batch, and which of the rank's chunks it is."""

    kind: str
    micro_batch: int
    chunk: int


@dataclass(frozen=True)
class Timeline:
    """A schedule in time: the boxes of every rank, in its order."""

    schedule: Schedule
    boxes: tuple[tuple[Box, ...], ...]

    @property
    def total(self) -> float:
        """From the first action of any rank to the end of the last."""
        ends = [row[-1].end for row in self.boxes if row]
        return max(ends) - min(row[0].start for row in self.boxes if row)

    def busy(self, rank: int) -> float:
        """How long a rank computes: the total of an ideal pipeline, which never waits."""
        return sum(box.end - box.start for box in self.boxes[rank])

    def bubble(self, rank: int) -> float:
        """How long it does not: before its first action, between, and after its last."""
        return self.total - self.busy(rank)

    def idle(self, rank: int) -> float:
        """How long it waits between its first action and its last."""
        row = self.boxes[rank]
        return row[-1].end - row[0].start - self.busy(rank)

    def pictured(self) -> list[tuple[int, float, float, tuple[Part, ...]]]:
        """Return all boxes as (rank, start, end, parts), as ``report.pipeline`` draws them."""
        found = []
        for rank, row in enumerate(self.boxes):
            number = {chunk: place for place, chunk in enumerate(self.schedule.chunks(rank))}
            for box in row:
                parts = tuple(
                    Part(action.kind, action.micro_batch, number[self.schedule.chunk(action)])
                    for action in box.step.actions
                )
                found.append((rank, box.start, box.end, parts))
        return found


def simulate(schedule: Schedule, clock: Clock) -> Timeline:
    """Return when everything happens if each rank begins each step as soon as it can.

    Raises BadInput for a table in which ranks wait for each other for ever.
    """
    made: dict[Action, float] = {}
    free = [0.0] * schedule.ranks
    boxes: list[list[Box]] = [[] for _ in range(schedule.ranks)]
    stuck: list[Stuck] = []
    for rank, _, step in in_order(schedule, stuck):
        start = free[rank]
        for need in schedule.needs(step):
            late = clock.message if schedule.owner(need) != rank else 0.0
            start = max(start, made[need] + late)
        free[rank] = start + clock.of(step)
        made.update((result, free[rank]) for result in step.results)
        boxes[rank].append(Box(rank, start, free[rank], step))
    if stuck:
        turn, missing = stuck[0]
        raise BadInput(
            f"schedule {schedule.name}: rank {turn.rank} waits for ever for {missing[0]} before "
            f"{turn.step}: see what `check` says of it"
        )
    return Timeline(schedule, tuple(map(tuple, boxes)))
