"""What a rank of a pipeline does, as data: actions, and the table of them that is a schedule.

Everything is made of three results, each made once for every stage and micro-batch:

- ``F``: the hidden states that leave the stage (forward);
- ``I``: the gradient of the hidden states that came into it (backward for the input);
- ``W``: the gradient of its weights (backward for the weights).

A full backward ``B`` makes ``I`` and ``W`` at once. Only ``I`` has somebody who waits for it, the
stage before, so a schedule may leave ``W`` for a moment when the rank would stand idle. A ``Pair``
runs the forward of one micro-batch and the full backward of another together, so that each one's
communication hides behind the other's arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """One kind of work of one stage on one micro-batch."""

    kind: Kind
    stage: int
    micro_batch: int

    @property
    def actions(self) -> tuple[Action, ...]:
        """The action itself, as a pair has two."""
        return (self,)

    @property
    def results(self) -> tuple[Action, ...]:
        """What it makes: actions of the kinds F, I and W stand for their results."""
        return (self._replace(kind="I"), self._replace(kind="W")) if self.kind == "B" else (self,)

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


class Pair(NamedTuple):
    """A forward and a full backward, of different micro-batches, that overlap."""

    forward: Action
    backward: Action

    @property
    def actions(self) -> tuple[Action, ...]:
        """Both, the forward first."""
        return (self.forward, self.backward)

    @property
    def results(self) -> tuple[Action, ...]:
        """What both make."""
        return self.forward.results + self.backward.results

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"


Step = Action | Pair


class Message(NamedTuple):
    """A result of one stage on its way to the stage that needs it; F or I.

    The rank that makes it and the rank that needs it may be the same.
    """

    result: Action
    source: int
    target: int

    @property
    def local(self) -> bool:
        """Whether it stays on its rank: nothing is sent."""
        return self.source == self.target


class Chunk(NamedTuple):
    """A stage as one rank holds it; where a pipeline has two directions, for one of them."""

    direction: int
    stage: int


@dataclass(frozen=True)
class Schedule:
    """Which rank holds which stages, and what it does in which order.

    ``places`` has for every direction the rank of each stage. The first direction takes the first
    of the micro-batches, and each the same number. ``steps`` has the steps of every rank.
    """

    name: str
    micro_batches: int
    places: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[Step, ...], ...]

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.steps)

    @property
    def stages(self) -> int:
        """Into how many stages the model is cut."""
        return len(self.places[0])

    def direction(self, micro_batch: int) -> int:
        """Return which way a micro-batch goes through the ranks."""
        return micro_batch * len(self.places) // self.micro_batches

    def rank_of(self, stage: int, micro_batch: int) -> int:
        """Return the rank that runs a stage on a micro-batch."""
        return self.places[self.direction(micro_batch)][stage]

    def owner(self, action: Action) -> int:
        """Return the rank that runs an action, or makes a result."""
        return self.rank_of(action.stage, action.micro_batch)

    def chunk(self, action: Action) -> Chunk:
        """Return which parameters an action uses."""
        return Chunk(self.direction(action.micro_batch), action.stage)

    def chunks(self, rank: int) -> tuple[Chunk, ...]:
        """Return the stages whose parameters a rank holds, by direction and depth."""
        return tuple(
            Chunk(direction, stage)
            for direction, place in enumerate(self.places)
            for stage, owner in enumerate(place)
            if owner == rank
        )

    def holders(self, stage: int) -> tuple[int, ...]:
        """Return the ranks that hold a copy of a stage: they add up its gradients."""
        return tuple(place[stage] for place in self.places)

    def needs(self, step: Step) -> tuple[Action, ...]:
        """Return the results that must exist before a step begins, on whatever rank."""
        return tuple(need for action in step.actions for need in self._needs(action))

    def _needs(self, action: Action) -> tuple[Action, ...]:
        kind, stage, micro_batch = action
        if kind == "F":
            return (Action("F", stage - 1, micro_batch),) if stage else ()
        if kind == "W":
            return (Action("I", stage, micro_batch),)
        own = Action("F", stage, micro_batch)
        last = stage == self.stages - 1
        return (own,) if last else (own, Action("I", stage + 1, micro_batch))

    def receives(self, step: Step) -> tuple[Message, ...]:
        """Return what other stages must have handed over before a step begins."""
        return tuple(
            Message(need, self.owner(need), self.owner(action))
            for action in step.actions
            for need in self._needs(action)
            if need.stage != action.stage
        )

    def sends(self, step: Step) -> tuple[Message, ...]:
        """Return what a step hands over to other stages when it has ended."""
        found = []
        for result in step.results:
            towards = {"F": 1, "I": -1, "W": 0}[result.kind]
            if towards and 0 <= result.stage + towards < self.stages:
                target = self.rank_of(result.stage + towards, result.micro_batch)
                found.append(Message(result, self.owner(result), target))
        return tuple(found)

    def channel(self, source: int, target: int) -> tuple[Message, ...]:
        """Return every message from one rank to another, in the order of sending.

        The target may need them in another order, so it has to post its receives in this one.
        """
        return tuple(
            message
            for step in self.steps[source]
            for message in self.sends(step)
            if message.target == target
        )

    def peak_live(self, rank: int) -> int:
        """Return for how many (stage, micro-batch) a rank holds activations at the worst moment.

        They live from F to the end of W: one whose weight gradient still waits counts in full.
        """
        live = peak = 0
        for step in self.steps[rank]:
            kinds = [result.kind for result in step.results]
            live += kinds.count("F")
            peak = max(peak, live)
            live -= kinds.count("W")
        return peak

    def __str__(self) -> str:
        """Write a line a rank: stage, kind and micro-batch of each action, as in ``0F3&0B1``."""
        lines = [f"{self.name}: {self.ranks} ranks, {self.micro_batches} micro-batches"]
        lines += [
            f"rank {rank}: {' '.join(map(str, steps))}" for rank, steps in enumerate(self.steps)
        ]
        return "\n".join(lines)
