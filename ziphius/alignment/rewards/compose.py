"""Rewards with weights, each on its part of the response, over many responses at once.

As in R1's last stage (facts 8.8): rules on what they are about, helpfulness on the summary alone,
safety on the whole response, and one number in the end.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ziphius.alignment.rewards.reward import Response, Reward
from ziphius.config.errors import BadInput, in_one_line

Part = Literal["whole", "thinking", "summary"]

# A reward that has not come back so many times is not asked again until some of them do.
_MOST_HUNG = 4


@dataclass(frozen=True)
class Weighted:
    """One reward of several: its name, its weight, and the part of a response that it sees.

    A part comes as a text of its own, without tags: a reward that looks for them needs the whole.
    """

    name: str
    reward: Reward
    weight: float = 1.0
    part: Part = "whole"


@dataclass(frozen=True)
class Scored:
    """A response's worth: ``total`` is the sum of weight times value over ``values`` by name.

    A reward in ``failed`` raised, gave no finite number or did not come back: its value is 0.
    """

    total: float
    values: Mapping[str, float]
    failed: tuple[str, ...] = ()


@dataclass
class _Job:
    index: int
    weighted: Weighted
    response: Response
    started: float = math.inf
    value: float = 0.0
    error: str = ""
    done: bool = False


@dataclass
class _Work:
    """The jobs of one call, shared by its threads under ``changed``."""

    waiting: deque[_Job]
    running: dict[threading.Thread, _Job] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)


class Composed:
    """A weighted sum of rewards; itself a reward.

    ``say`` is told each reward's first failure, ``failures`` counts them all. ``seconds`` is the
    longest that one reward may take for one response.
    """

    def __init__(
        self,
        rewards: Iterable[Weighted],
        *,
        say: Callable[[str], None],
        threads: int = 8,
        seconds: float = 60.0,
    ) -> None:
        """Check the rewards. Raises BadInput for two of one name, none, or impossible weights."""
        self.rewards = tuple(rewards)
        names = [weighted.name for weighted in self.rewards]
        if not names or len(set(names)) < len(names):
            raise BadInput(f"rewards {names}: give one or more, each with a name of its own")
        for weighted in self.rewards:
            if not math.isfinite(weighted.weight):
                raise BadInput(f"reward {weighted.name}: weight {weighted.weight} is not finite")
        if threads < 1 or not seconds > 0:
            raise BadInput(f"rewards by {threads} threads in {seconds} s: give positive numbers")
        self.failures = dict.fromkeys(names, 0)
        self._say, self._threads, self._seconds = say, threads, seconds
        self._hung: dict[str, list[threading.Thread]] = {name: [] for name in names}

    def __call__(self, response: Response) -> float:
        """Return one response's total."""
        return self.score([response])[0].total

    def score(self, responses: Sequence[Response]) -> list[Scored]:
        """Score responses side by side; return them in the same order. One call at a time."""
        jobs = [
            _Job(index, weighted, seen(response, weighted.part))
            for index, response in enumerate(responses)
            for weighted in self.rewards
        ]
        work = _Work(deque(jobs))
        with work.changed:
            for _ in range(min(self._threads, len(jobs))):
                self._start_thread(work)
            while work.waiting or work.running:
                work.changed.wait(self._until_next_deadline(work))
                self._give_up_the_overdue(work)
        for job in jobs:
            self._count(job)
        size = len(self.rewards)
        return [_sum(jobs[at : at + size]) for at in range(0, len(jobs), size)]

    def _start_thread(self, work: _Work) -> None:
        # Nobody waits for a thread that hangs, at the end of the program neither.
        threading.Thread(target=self._work_on, args=(work,), daemon=True).start()

    def _work_on(self, work: _Work) -> None:
        this = threading.current_thread()
        while True:
            with work.changed:
                if not work.waiting:
                    return
                job = work.waiting.popleft()
                job.started = time.monotonic()
                work.running[this] = job
            value, error = self._ask(job)
            with work.changed:
                if job.done:  # given up: another thread has this one's place
                    return
                job.value, job.error, job.done = value, error, True
                del work.running[this]
                work.changed.notify()

    def _ask(self, job: _Job) -> tuple[float, str]:
        name = job.weighted.name
        if sum(thread.is_alive() for thread in self._hung[name]) >= _MOST_HUNG:
            return 0.0, f"is not asked: {_MOST_HUNG} calls of it have not come back"
        try:
            value = float(job.weighted.reward(job.response))
        except BaseException as error:  # a reward that exits is one that fails
            return 0.0, f"{type(error).__name__}: {in_one_line(error)}"
        return (value, "") if math.isfinite(value) else (0.0, f"gave {value}")

    def _until_next_deadline(self, work: _Work) -> float:
        first = min((job.started for job in work.running.values()), default=time.monotonic())
        return max(0.0, first + self._seconds - time.monotonic())

    def _give_up_the_overdue(self, work: _Work) -> None:
        latest = time.monotonic() - self._seconds
        for thread, job in list(work.running.items()):
            if job.started <= latest:
                job.error, job.done = f"gave nothing within {self._seconds:g} s", True
                del work.running[thread]
                hung = [other for other in self._hung[job.weighted.name] if other.is_alive()]
                self._hung[job.weighted.name] = [*hung, thread]
                self._start_thread(work)

    def _count(self, job: _Job) -> None:
        name = job.weighted.name
        if job.error:
            self.failures[name] += 1
            if self.failures[name] == 1:
                self._say(
                    f"reward {name}: {job.error}: it counts 0 for this sample of task "
                    f"{job.response.problem.task}; later failures are only counted"
                )


def seen(response: Response, part: Part) -> Response:
    """Return a response of which only a part is left. Its count of tokens stays the whole's."""
    if part == "whole":
        return response
    text = response.thinking if part == "thinking" else response.summary
    return replace(response, text=text)


def _sum(jobs: Sequence[_Job]) -> Scored:
    return Scored(
        math.fsum(job.weighted.weight * job.value for job in jobs),
        {job.weighted.name: job.value for job in jobs},
        tuple(job.weighted.name for job in jobs if job.error),
    )
