"""Groups of answers by the policy of the moment, judged, as the batches that it learns from."""

from __future__ import annotations

import base64
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ziphius.alignment.grpo import ADVANTAGE, OLD, SHARE, advantages
from ziphius.alignment.packing import as_rows
from ziphius.alignment.records import Sample
from ziphius.alignment.reference import REFERENCE
from ziphius.alignment.rewards.reward import Response
from ziphius.alignment.tasks.problem import Problem
from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.config.grpo import GrpoConfig
from ziphius.data.pack import best_fit
from ziphius.data.rows import EXPERTS, Batch
from ziphius.parallel.collectives import Axis
from ziphius.training.together import from_all


@dataclass(frozen=True)
class Answered:
    """One answer: its tokens, their log-probabilities, and the experts chosen on the way.

    ``experts``, int16 ``[prompt + answer - 1, layers, K]``, are those of every token but the last.
    """

    tokens: Sequence[int]
    log_probs: Sequence[float]
    text: str
    finished: bool
    experts: NDArray[np.int16] | None = None


@dataclass(frozen=True)
class Asked:
    """A problem as a prompt. ``opened`` is the part of the reasoning that it begins with."""

    problem: Problem
    prompt: Sequence[int]
    opened: str = ""


class Answerers(Protocol):
    """Whoever answers with the policy's weights: this process, or others.

    ``axis`` are the ranks that share the questions; all of them ask at the same time.
    """

    @property
    def axis(self) -> Axis:
        """Who shares the questions."""
        ...

    def begin(self, asked: Sequence[Asked], seeds: Sequence[int]) -> Any:
        """Ask, by the weights of this moment; return what ``collect`` is given."""
        ...

    def collect(self, ticket: Any) -> list[list[Answered]]:
        """Return a group of answers to every prompt."""
        ...

    def close(self) -> None:
        """End whatever runs elsewhere."""
        ...


@dataclass(frozen=True)
class Judgement:
    """What an answer is worth, the rewards it is the sum of, and whether it is right."""

    reward: float
    parts: Mapping[str, float]
    right: bool


Judge = Callable[[Sequence[Response]], list[Judgement]]
# The prompt of rollout n's question m.
Ask = Callable[[int, int], Asked]


@dataclass
class Rollout:
    """A question's group, and what became of it."""

    asked: Asked
    answers: list[Answered]
    judgements: list[Judgement]
    advantages: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Begun:
    """A rollout that has been asked: all of its questions, this rank's, and its answers' ticket."""

    asked: list[Asked]
    own: list[Asked]
    ticket: Any


class Rollouts:
    """An endless stream of batches: rollouts, each learned in several steps (see ``GrpoConfig``).

    What is asked in rollout n depends on the seed and n alone, and so do the answers, given the
    weights. Between rollouts the stream can stop and go on: see ``at_rest``.
    """

    def __init__(self, config: GrpoConfig, ask: Ask, judge: Judge, *, seed: int) -> None:
        self.config, self.ask, self.judge, self.seed = config, ask, judge, seed
        self.least_rows = 1  # of a batch: one a rank that shares it
        self.number = 0
        self.answerers: Answerers | None = None
        self.before: Callable[[int], None] = lambda rollout: None
        self.told: dict[str, Any] = {}
        self._pending: deque[Batch] = deque()
        self._begun: _Begun | None = None
        self._identity = f"{seed}/{config.model_dump_json(exclude={'steps', 'tokens'})}"

    @property
    def at_rest(self) -> bool:
        """Whether every answer has been learned."""
        return not self._pending

    def next_batch(self, batch_size: int) -> Batch:
        """Return the next step's rows, as many as its answers fill; answer first if need be."""
        if not self._pending:
            began = time.perf_counter()
            self.before(self.number)
            rollouts = self._roll()
            self.told |= {"sampling_seconds": round(time.perf_counter() - began, 3)}
            self._pending += self._batches(rollouts)
            self.number += 1
        else:
            self.told = {**self.told, "sampling_seconds": 0.0}
        return self._pending.popleft()

    def state(self) -> dict[str, Any]:
        """Return how many rollouts there were. Only at rest."""
        assert self.at_rest, "answers that are not learned yet are not kept"
        return {"rollouts": self.number, "identity": self._identity}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on there. Raises BadInput for the state of other rollouts."""
        if state.get("identity") != self._identity:
            raise BadInput("the rollouts are of another [grpo] table or seed than this run's")
        self.number = int(state["rollouts"])
        self.forget()

    @property
    def turn(self) -> int:
        """All of the stream is one text."""
        return 0

    def forget(self) -> None:
        """Leave out answers of a policy that is gone, those that are on their way included."""
        self._pending.clear()
        self._begun = None

    def close(self) -> None:
        """End who answers."""
        if self.answerers is not None:
            self.answerers.close()

    def _roll(self) -> list[Rollout]:
        """Ask, take the answers, judge them, and find the advantages."""
        begun = self._begun or self._begin(self.number)
        assert self.answerers is not None, "told who answers when the stage begins"
        groups = self.answerers.collect(begun.ticket)
        # The next rollout's answers are by weights that have not learned from this one's.
        self._begun = self._begin(self.number + 1) if self.config.ahead else None
        rollouts = self._shared(begun, groups)
        rewards_QG = torch.tensor(
            [[j.reward for j in r.judgements] for r in rollouts], dtype=torch.float64
        )
        for rollout, row in zip(
            rollouts, advantages(rewards_QG, self.config.deviation).tolist(), strict=True
        ):
            rollout.advantages = row
        self.told = _summary(rollouts)
        return rollouts

    def _begin(self, number: int) -> _Begun:
        """Let this rank ask its share of a rollout's questions."""
        assert self.answerers is not None, "told who answers when the stage begins"
        questions, axis = self.config.questions, self.answerers.axis
        asked = [self.ask(number, place) for place in range(questions)]
        self._require_room(asked)
        seeds = [(self.seed << 32) + number * questions + place for place in range(questions)]
        own = slice(axis.place, None, axis.size)
        return _Begun(asked, asked[own], self.answerers.begin(asked[own], seeds[own]))

    def _require_room(self, asked: Sequence[Asked]) -> None:
        """Refuse questions whose answers might not fit into a row. Raises BadInput."""
        config, longest = self.config, max(len(one.prompt) for one in asked)
        if longest + config.max_tokens > config.sequence_length + 1:
            raise BadInput(
                f"grpo.sequence_length = {config.sequence_length}: a question of {longest} tokens "
                f"and an answer of grpo.max_tokens = {config.max_tokens} do not fit into a row: "
                "lengthen rows or shorten answers"
            )

    def _shared(self, begun: _Begun, groups: list[list[Answered]]) -> list[Rollout]:
        """Judge this rank's share, and return all groups on all ranks."""
        assert self.answerers is not None, "told who answers when the stage begins"
        axis = self.answerers.axis
        own, failure = list[Rollout](), None
        try:
            own = self._judged(begun.own, groups)
        except ZiphiusError as error:
            failure = error
        if axis.size == 1 and failure is None:
            return own
        told = from_all(axis, [_packed(rollout) for rollout in own], failure)
        return [
            _unpacked(one, told[place % axis.size][place // axis.size])
            for place, one in enumerate(begun.asked)
        ]

    def _judged(self, asked: Sequence[Asked], groups: list[list[Answered]]) -> list[Rollout]:
        responses = [
            Response(one.problem, one.opened + answer.text, len(answer.tokens), answer.finished)
            for one, group in zip(asked, groups, strict=True)
            for answer in group
        ]
        judged, size = self.judge(responses), self.config.group
        return [
            Rollout(one, group, judged[place * size : (place + 1) * size])
            for place, (one, group) in enumerate(zip(asked, groups, strict=True))
        ]

    def _batches(self, rollouts: Sequence[Rollout]) -> list[Batch]:
        """Divide the answers of groups that teach something into steps, and these into rows."""
        kept = [(r, n) for r in rollouts if any(r.advantages) for n in range(len(r.answers))]
        updates = self.config.updates
        answers = self.config.questions * self.config.group
        parts = [kept[place::updates] for place in range(updates)]
        # Where nothing teaches, one answer keeps the step.
        batches = [
            self._batch(part or [(rollouts[0], 0)], answers / updates, teaches=bool(part))
            for part in parts
        ]
        return batches * self.config.epochs

    def _batch(
        self, part: Sequence[tuple[Rollout, int]], answers: float, *, teaches: bool
    ) -> Batch:
        """Pack answers into rows. ``answers`` is what a step's mean is over.

        What does not teach keeps the step, and has no share in anything.
        """
        length = self.config.sequence_length + 1
        samples = [_sample(rollout, n) for rollout, n in part]
        row_of = best_fit(np.array([len(sample) for sample in samples]), length)
        rows: list[list[int]] = [[] for _ in range(int(row_of.max()) + 1)]
        for place, row in enumerate(row_of):
            rows[row].append(place)
        rows += [[] for _ in range(self.least_rows - len(rows))]
        batch = as_rows([[samples[n] for n in row] for row in rows], length)
        learned = sum(int(sample.learned.sum()) for sample in samples)
        fields = _fields(part, rows, length)
        for rollout_n, values in zip(part, fields.shares, strict=True):
            written = len(rollout_n[0].answers[rollout_n[1]].tokens)
            share = 1 / learned if self.config.form == "batch" else 1 / (written * answers)
            values[:] = share * teaches
        found = {**batch.fields, **fields.tensors(self.config.replay)}
        if self.config.kl_weight:
            found[REFERENCE] = torch.zeros_like(found[OLD])
        return Batch(batch.tokens_BS, batch.documents_BS, found)


def _packed(rollout: Rollout) -> dict[str, Any]:
    """Return what other ranks need of a group, as JSON."""
    answers = []
    for answer in rollout.answers:
        told = {**vars(answer), "experts": None, "tokens": list(answer.tokens)}
        if answer.experts is not None:
            data = base64.b64encode(answer.experts.tobytes()).decode()
            told["experts"] = [data, answer.experts.shape]
        answers.append(told)
    return {"answers": answers, "judgements": [vars(j) for j in rollout.judgements]}


def _unpacked(asked: Asked, told: dict[str, Any]) -> Rollout:
    answers = []
    for answer in told["answers"]:
        experts = answer["experts"]
        if experts is not None:
            experts = np.frombuffer(base64.b64decode(experts[0]), np.int16).reshape(experts[1])
        answers.append(Answered(**{**answer, "experts": experts}))
    return Rollout(asked, answers, [Judgement(**judged) for judged in told["judgements"]])


def _sample(rollout: Rollout, n: int) -> Sample:
    prompt, answer = rollout.asked.prompt, rollout.answers[n].tokens
    learned = np.repeat((False, True), (len(prompt), len(answer)))
    return Sample(np.array([*prompt, *answer], np.int32), learned)


@dataclass
class _Fields:
    """What tokens of rows know, and the stretches of ``share`` of every answer."""

    old: NDArray[np.float32]
    advantage: NDArray[np.float32]
    share: NDArray[np.float32]
    experts: NDArray[np.int16] | None
    shares: list[NDArray[np.float32]]

    def tensors(self, replay: bool) -> dict[str, torch.Tensor]:
        known = {OLD: self.old, ADVANTAGE: self.advantage, SHARE: self.share}
        found = {name: torch.from_numpy(values) for name, values in known.items()}
        if replay and self.experts is not None:
            found[EXPERTS] = torch.from_numpy(self.experts)
        return found


def _fields(part: Sequence[tuple[Rollout, int]], rows: list[list[int]], length: int) -> _Fields:
    """Lay out what is known of the answers' tokens as ``as_rows`` lays out the tokens."""
    shape = (len(rows), length)
    old, advantage, share = (np.zeros(shape, np.float32) for _ in range(3))
    first = part[0][0].answers[part[0][1]].experts
    experts = None
    if first is not None:
        experts = _anything(shape, *first.shape[1:])
    shares: list[NDArray[np.float32]] = [share[0, :0]] * len(part)
    for row, places in enumerate(rows):
        end = 0
        for place in places:
            rollout, n = part[place]
            answer, begin = rollout.answers[n], end
            end += len(rollout.asked.prompt) + len(answer.tokens)
            wrote = slice(end - len(answer.tokens), end)
            old[row, wrote] = answer.log_probs
            advantage[row, wrote] = rollout.advantages[n]
            shares[place] = share[row, wrote]
            if experts is not None and answer.experts is not None:
                experts[row, begin : begin + len(answer.experts)] = answer.experts
    return _Fields(old, advantage, share, experts, shares)


def _anything(shape: tuple[int, int], layers: int, top_k: int) -> NDArray[np.int16]:
    """Return some experts for tokens of which none are known, such as padding: all different."""
    return np.broadcast_to(np.arange(top_k, dtype=np.int16), (*shape, layers, top_k)).copy()


def _summary(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Return what metrics tell of a rollout."""
    judged = [j for r in rollouts for j in r.judgements]
    answers = [a for r in rollouts for a in r.answers]
    tokens = sum(len(a.tokens) for a in answers)
    told: dict[str, Any] = {
        "reward": sum(j.reward for j in judged) / len(judged),
        "accuracy": sum(j.right for j in judged) / len(judged),
        "length": tokens / len(answers),
        "unfinished": sum(not a.finished for a in answers) / len(answers),
        "groups_left_out": sum(not any(r.advantages) for r in rollouts) / len(rollouts),
        "sampled_tokens": tokens,
    }
    for task in sorted({r.asked.problem.task for r in rollouts}):
        own = [j.right for r in rollouts for j in r.judgements if r.asked.problem.task == task]
        told[f"accuracy.{task}"] = sum(own) / len(own)
    return told
