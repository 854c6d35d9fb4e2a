"""What a model is worth on held-out problems of tasks: right answers, and how they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ziphius.alignment.questions import Prompter
from ziphius.alignment.rewards.find import is_right
from ziphius.alignment.rewards.reward import Response
from ziphius.alignment.style import Style, style_of
from ziphius.alignment.tasks.mixture import Mixture
from ziphius.alignment.tasks.problem import Problem, distinct_problems
from ziphius.inference.llm import LLM
from ziphius.inference.params import SamplingParams

_SEED = 20241226  # of the problems that measure: apart from every run's own


@dataclass(frozen=True)
class Measured:
    """By task, shares of right answers and tokens an answer; and the style of all answers."""

    accuracy: dict[str, float]
    lengths: dict[str, float]
    style: Style
    samples: list[dict[str, str]]

    def describe(self) -> dict[str, Any]:
        """Return what a summary has of it."""
        return {
            "accuracy": self.accuracy,
            "length": self.style.length,
            "lengths": self.lengths,
            "style": asdict(self.style),
            "samples": self.samples,
        }


def heldout_problems(tasks: Mixture, count: int) -> list[Problem]:
    """Return the same ``count`` test problems of every task each time.

    Raises BadInput where a task has fewer.
    """
    return [
        problem
        for task in tasks.tasks.values()
        for problem in distinct_problems(task, _SEED, "test", count)
    ]


def measure(
    llm: LLM,
    tasks: Mixture,
    prompter: Prompter,
    *,
    problems: int,
    max_tokens: int,
    temperature: float = 0.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Ask ``problems`` different test problems of every task, once each; greedy unless told.

    No training draw has them. Raises BadInput where a task has fewer.
    """
    asked = [prompter.ask(problem) for problem in heldout_problems(tasks, problems)]
    # A seed of its own for each: the same noise would choose the same first word for all.
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=_SEED + place)
        for place in range(len(asked))
    ]
    prompts = [{"prompt_token_ids": list(one.prompt)} for one in asked]
    outputs = [r.outputs[0] for r in llm.generate(prompts, params, on_progress=on_progress)]
    responses = [
        Response(one.problem, one.opened + o.text, len(o.token_ids), o.finish_reason == "stop")
        for one, o in zip(asked, outputs, strict=True)
    ]
    accuracy, lengths, samples = {}, {}, []
    for name in tasks.tasks:
        own = [r for r in responses if r.problem.task == name]
        accuracy[name] = sum(is_right(tasks, r) for r in own) / len(own)
        lengths[name] = sum(r.tokens for r in own) / len(own)
        first = own[0]
        samples.append(
            {
                "task": name,
                "question": first.problem.question,
                "answer": first.problem.answer,
                "response": first.text,
            }
        )
    return Measured(accuracy, lengths, style_of(responses), samples)
