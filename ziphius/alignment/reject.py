"""Rejection sampling: a teacher's right and short answers become records (facts 8.1)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ziphius.alignment.rewards.find import is_right
from ziphius.alignment.rewards.form import think_form
from ziphius.alignment.rewards.reward import Response
from ziphius.alignment.tasks.mixture import Mixture
from ziphius.alignment.tasks.problem import Problem
from ziphius.alignment.teachers import Teacher
from ziphius.checkpoint.files import write_atomic
from ziphius.config.distill import DistillConfig
from ziphius.data.tokenizer import END_THINK, THINK

_AT_A_TIME = 64  # problems that a teacher is given together


@dataclass
class Count:
    """What became of a task's tries. ``given_up`` are problems of which nothing was kept."""

    problems: int = 0
    tries: int = 0
    right: int = 0
    kept: int = 0
    given_up: int = 0

    @property
    def rejected(self) -> float:
        """The share of tries that did not become records."""
        return 1 - self.kept / self.tries if self.tries else 0.0


@dataclass
class Rejected:
    """Records, and the counts by task."""

    records: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Count] = field(default_factory=dict)


def reject(
    teacher: Teacher,
    tasks: Mixture,
    config: DistillConfig,
    *,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, all: None,
) -> Rejected:
    """Ask a teacher ``config.problems`` training problems and keep what is worth learning."""
    found = Rejected()
    problems = [tasks.problem_at(seed, "train", n) for n in range(config.problems)]
    for first in range(0, len(problems), _AT_A_TIME):
        some = problems[first : first + _AT_A_TIME]
        seeds = [(seed << 32) + (first + place) * config.tries for place in range(len(some))]
        answers = teacher.answer(some, seeds)
        for problem, own_seed, responses in zip(some, seeds, answers, strict=True):
            _judge(found, tasks, config, teacher, problem, own_seed, responses)
        on_progress(first + len(some), len(problems))
    return found


def write_records(records: Sequence[dict[str, Any]], target: Path) -> None:
    """Write records as JSON lines, all or none."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomic(target, "".join(lines).encode())


def worth_keeping(right: Sequence[Response], keep: int) -> list[Response]:
    """Return the shortest of right responses that have their form, each text once."""
    distinct = {response.text: response for response in right if _has_form(response)}
    return sorted(distinct.values(), key=lambda r: (r.tokens, len(r.text), r.text))[:keep]


def _has_form(response: Response) -> bool:
    # An answer may come without reasoning, but not with half of it.
    text = response.text
    at_once = text.startswith(THINK + END_THINK) and text.count("think>") == 2
    return "think>" not in text or at_once or bool(think_form(response))


def _judge(
    found: Rejected,
    tasks: Mixture,
    config: DistillConfig,
    teacher: Teacher,
    problem: Problem,
    seed: int,
    responses: Sequence[Response],
) -> None:
    right = [response for response in responses if is_right(tasks, response)]
    kept = worth_keeping(right, config.keep)
    count = found.counts.setdefault(problem.task, Count())
    count.problems += 1
    count.tries += len(responses)
    count.right += len(right)
    count.kept += len(kept)
    count.given_up += not kept
    told = {**teacher.about, "seed": seed, "tries": len(responses), "right": len(right)}
    for response in kept:
        about = {"task": problem.task, "key": problem.key, "teacher": {**told, "verdict": "right"}}
        found.records += [
            {"messages": messages, **about} for messages in _conversations(config, response)
        ]


def _conversations(config: DistillConfig, response: Response) -> Iterator[list[dict[str, Any]]]:
    problem = response.problem
    asked = {"role": "user", "content": problem.question}
    answered: dict[str, Any] = {"role": "assistant", "content": response.summary.strip()}
    if END_THINK in response.text:
        answered["reasoning_content"] = response.thinking
    if config.samples == "final":
        yield [asked, answered]
        return
    if problem.answer:
        yield [asked, {"role": "assistant", "content": problem.answer}]
    yield [{"role": "system", "content": config.system}, asked, answered]
