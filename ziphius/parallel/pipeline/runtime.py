"""Runs the steps of a schedule's table that are this rank's: forwards, backwards, and messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ziphius.config.errors import BadInput, ZiphiusError, in_one_line
from ziphius.data.rows import EXPERTS
from ziphius.kernels.later import Later, PutOff
from ziphius.model.transformer import Transformer
from ziphius.parallel.collectives import Axis, Pending
from ziphius.parallel.passes import Objective, Result
from ziphius.parallel.pipeline.actions import Action, Chunk, Message, Schedule, Step
from ziphius.parallel.pipeline.overlap import Ahead, Behind, CommunicationLane, Trace, Weave
from ziphius.parallel.pipeline.staged import Staged
from ziphius.parallel.rows import MicroBatch

# Messages of a channel that may arrive while the rank computes: more would take memory.
AHEAD = 1


class Alive(NamedTuple):
    """What backward needs of a forward: where the input's gradient arrives, and where it begins.

    The output itself is not among it: it is free when it has been sent.
    """

    x_BTD: Tensor | None
    hidden: GradientEdge | None
    total: GradientEdge | None


class Pipeline:
    """One rank's stages and its place in the schedule."""

    def __init__(
        self,
        schedule: Schedule,
        models: Mapping[Chunk, Transformer],
        axis: Axis,
        later: Later,
        *,
        document_mask: bool = False,
        overlap: bool = False,
        trace: Trace | None = None,
    ) -> None:
        """``axis`` is ``mesh["pp"]``; models are those of ``build_stages``, which got ``later``.

        With ``overlap`` a pair's two halves run together (see ``overlap.py``), else one after the
        other. What was done when is then added to ``trace``.
        """
        if axis.size != schedule.ranks:
            raise BadInput(
                f"schedule {schedule.name} of {schedule.ranks} ranks on a pipeline of {axis.size}: "
                "make it for as many as parallel.pp says"
            )
        self.schedule, self.models, self.axis, self.later = schedule, models, axis, later
        self.document_mask, self.overlap, self.trace = document_mask, overlap, trace

    def run(
        self, micro_batches: Sequence[MicroBatch], objective: Objective, scale: float = 1.0
    ) -> Result:
        """Run forward and backward of a step; gradients are added to those that weights have.

        Every rank gives the same micro-batches; gradients are multiplied by ``scale``. What several
        ranks hold has on each the gradients of its own micro-batches: ``Sharding`` sums them.
        Raises Lost where another rank does not answer in time, and ZiphiusError where a computation
        fails; both name the rank, the action and its micro-batch.
        """
        if len(micro_batches) != self.schedule.micro_batches:
            raise BadInput(
                f"schedule {self.schedule.name} is for {self.schedule.micro_batches} micro-batches,"
                f" and there are {len(micro_batches)}"
            )
        lane = CommunicationLane(self.axis.traffic, self.trace) if self.overlap else None
        try:
            return self._run(_Run(self, micro_batches, objective, scale, lane))
        finally:
            if lane is not None:
                lane.close()

    @torch.no_grad()
    def measure(self, micro_batches: Sequence[MicroBatch], objective: Objective) -> Result:
        """Run forward only: the schedule has nothing else."""
        return self._run(_Run(self, micro_batches, objective, None, None))

    def _run(self, run: _Run) -> Result:
        try:
            run.all_steps()
        except BaseException:
            self.later.drop()
            raise
        return run.result


@dataclass
class _Channel:
    """Messages from one rank, which come in this order, and those that are on their way."""

    left: deque[Message]
    posted: dict[Message, Pending] = field(default_factory=dict)
    tag: int = 0


class _Run:
    """One step's state."""

    def __init__(
        self,
        of: Pipeline,
        micro_batches: Sequence[MicroBatch],
        objective: Objective,
        scale: float | None,
        lane: CommunicationLane | None,
    ) -> None:
        self.lane, self.trace = lane, of.trace
        self.schedule, self.models, self.axis, self.later = (
            of.schedule,
            of.models,
            of.axis,
            of.later,
        )
        self.micro_batches, self.objective = micro_batches, objective
        self.document_mask, self.rank = of.document_mask, of.axis.place
        model = next(iter(of.models.values()))
        config, self.device, self.dtype = model.config, model.device, model.precision.compute
        self.trains = scale is not None
        self.sent_back = torch.full(
            (), scale or 0.0, dtype=model.precision.high, device=self.device
        )
        self.width, self.positions = config.hidden_size, model.positions
        self.result = Result.zero(config, self.device, objective.size)
        self.alive: dict[tuple[int, int], Alive | Staged | None] = {}  # by stage and micro-batch
        self.handed: dict[Action, Tensor] = {}  # from one stage of this rank to another
        self.sent: dict[Message, Pending] = {}
        others = [rank for rank in range(self.schedule.ranks) if rank != self.rank]
        self.tags = {
            message: tag
            for other in others
            for tag, message in enumerate(self.schedule.channel(self.rank, other))
        }
        self.channels = {
            source: _Channel(deque(self.schedule.channel(source, self.rank))) for source in others
        }
        self.answers = {
            message: answered
            for other in others
            for message, answered in _answers(self.schedule, self.rank, other)
        }

    def all_steps(self) -> None:
        """Run everything, and wait until all that was sent has arrived."""
        for source in self.channels:
            self._post(source)
        for step in self.schedule.steps[self.rank]:
            if self.lane is not None:
                self._together(step, self.lane)
                continue
            for action in step.actions:
                arrived = self._receive(action)
                with self._named(action):
                    made = self._do(action, arrived)
                self._send(action, made)
        for pending in self.sent.values():
            pending.wait()
        left = [*self.alive, *self.handed]
        assert not left, f"{left} were made for nobody"

    # Computing

    def _do(self, action: Action, arrived: Tensor | None) -> Tensor | None:
        if action.kind == "F":
            return self._forward(action, arrived)
        if action.kind == "W":
            self.later.run(action)
            del self.alive[action.stage, action.micro_batch]
            return None
        if action.kind == "B":
            made = self._backward(action, arrived)
            del self.alive[action.stage, action.micro_batch]
            return made
        with self.later.open(action._replace(kind="W")):
            return self._backward(action, arrived)

    def _forward(self, action: Action, x_BTD: Tensor | None) -> Tensor | None:
        model = self.models[self.schedule.chunk(action)]
        batch, counts = self.micro_batches[action.micro_batch]
        if x_BTD is not None:
            x_BTD.requires_grad_(self.trains)
        documents_BS = batch.documents_BS if self.document_mask else None
        with torch.set_grad_enabled(self.trains):
            experts_BSLK = batch.fields.get(EXPERTS)
            features = model.features(batch.tokens_BS, documents_BS, x_BTD, experts_BSLK)
            parts = self.objective(model, features, batch)
        if counts:
            self.result.add(parts, features.routings)
        ends = model.part.ends
        if self.trains:
            hidden = None if ends else get_gradient_edge(features.hidden_BTD)
            begin = get_gradient_edge(parts.total) if parts.total.requires_grad else None
            self.alive[action.stage, action.micro_batch] = Alive(x_BTD, hidden, begin)
            self.result.peak = max(self.result.peak, len(self.alive))
        return None if ends else features.hidden_BTD.detach()

    def _backward(self, action: Action, dhidden_BTD: Tensor | None) -> Tensor | None:
        """Return the input's gradient; of weights what is not put off goes to the weights."""
        place = (action.stage, action.micro_batch)
        alive = self.alive[place]
        assert isinstance(alive, Alive), "a backward for the input runs once"
        self.alive[place] = None  # what waits for W still counts
        roots: list[GradientEdge] = []
        gradients: list[Tensor] = []
        if alive.hidden is not None:
            assert dhidden_BTD is not None, "the stage behind sends its input's gradient"
            roots.append(alive.hidden)
            gradients.append(dhidden_BTD)
        if alive.total is not None:
            roots.append(alive.total)
            counts = self.micro_batches[action.micro_batch].counts
            gradients.append(self.sent_back * counts)
        torch.autograd.backward(roots, gradients)
        return None if alive.x_BTD is None else alive.x_BTD.grad

    # Computing two at once

    def _together(self, step: Step, lane: CommunicationLane) -> None:
        """Run a step by the stages of blocks; what leaves is sent as soon as it is there."""
        given = {action.kind: self._receive(action) for action in step.actions}
        ahead = behind = None
        with self._named(*step.actions):
            for action in step.actions:
                if action.kind == "F":
                    ahead = self._ahead(action, given["F"], lane)
                elif action.kind == "W":
                    self.later.run(action)
                else:
                    behind = self._behind(action, given[action.kind])
            Weave(ahead, behind, lane, self.trace).run()
        for action in step.actions:
            if action.kind in "BW":
                del self.alive[action.stage, action.micro_batch]

    def _ahead(self, action: Action, x_BTD: Tensor | None, lane: CommunicationLane) -> Ahead:
        model, mask = self.models[self.schedule.chunk(action)], self.document_mask
        rows, counts = self.micro_batches[action.micro_batch]
        staged = Staged(model, rows, x_BTD, lane, self.later, document_mask=mask)
        self.alive[action.stage, action.micro_batch] = staged
        self.result.peak = max(self.result.peak, len(self.alive))

        def leave() -> None:
            routings = staged.routings
            parts, hidden_BTD = staged.leave(self.objective)
            if counts:
                self.result.add(parts, routings)
            self._send(action, hidden_BTD)

        return Ahead(staged, (action.stage, action.micro_batch), leave)

    def _behind(self, action: Action, dhidden_BTD: Tensor | None) -> Behind:
        place = (action.stage, action.micro_batch)
        staged = self.alive[place]
        assert isinstance(staged, Staged), "a backward for the input runs once"
        self.alive[place] = None
        dtotal = self.sent_back * self.micro_batches[action.micro_batch].counts
        kept: PutOff = []
        if action.kind == "I":
            self.later.keep(action._replace(kind="W"), kept)
        return Behind(
            staged,
            place,
            enter=lambda: staged.enter_back(dhidden_BTD, dtotal),
            give=lambda dx_BTD: self._send(action, dx_BTD),
            put_off=kept.extend if action.kind == "I" else self.later.add_up,
        )

    # Messages

    def _receive(self, action: Action) -> Tensor | None:
        """Return what another stage has made for an action, if it needs any."""
        for message in self.schedule.receives(action):
            if message.local:
                return self.handed.pop(message.result)
            channel = self.channels[message.source]
            while message not in channel.posted:
                self._post_next(message.source)
            arrived = channel.posted.pop(message).wait()
            for answered in self.answers[message]:
                self.sent.pop(answered).wait()
            self._post(message.source)
            return arrived
        return None

    def _post(self, source: int) -> None:
        """Let the next messages of a channel come while this rank computes."""
        channel = self.channels[source]
        while channel.left and len(channel.posted) < AHEAD:
            self._post_next(source)

    def _post_next(self, source: int) -> None:
        channel = self.channels[source]
        message = channel.left.popleft()
        rows, length = self.micro_batches[message.result.micro_batch].rows.tokens_BS.shape
        shape = (rows, self.positions.count(length - 1), self.width)
        out_BtD = torch.empty(shape, dtype=self.dtype, device=self.device)
        channel.posted[message] = self.axis.start_receive(
            out_BtD, source, what=_told(message.result), tag=channel.tag
        )
        channel.tag += 1

    def _send(self, action: Action, made: Tensor | None) -> None:
        """Hand over what an action has made."""
        for message in self.schedule.sends(action):
            assert made is not None, "a stage that is not the last makes what the next one needs"
            if message.local:
                self.handed[message.result] = made
                continue
            what, tag = _told(message.result), self.tags[message]
            self.sent[message] = self.axis.start_send(made, message.target, what=what, tag=tag)
            self.result.peak_sent = max(self.result.peak_sent, len(self.sent))

    @contextmanager
    def _named(self, *actions: Action) -> Iterator[None]:
        """Say what failed where."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            rank = self.axis.ranks[self.axis.place]
            told = " beside ".join(map(_told, actions))
            raise ZiphiusError(f"rank {rank}: {told} failed: {in_one_line(error)}") from error


def _answers(
    schedule: Schedule, rank: int, other: int
) -> Iterator[tuple[Message, tuple[Message, ...]]]:
    """Yield of every message from another rank which of this one's had arrived when it was sent.

    Each of these is named once. So memory of what was sent is free as soon as that is known; a
    backend need not be asked (gloo does not tell without waiting).
    """
    arrived: list[Message] = []
    actions = (action for step in schedule.steps[other] for action in step.actions)
    for action in actions:
        arrived += [message for message in schedule.receives(action) if message.source == rank]
        for message in schedule.sends(action):
            if message.target == rank:
                yield message, tuple(arrived)
                arrived = []


KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
}


def _told(action: Action) -> str:
    return f"{KINDS[action.kind]} of stage {action.stage} on micro-batch {action.micro_batch}"
