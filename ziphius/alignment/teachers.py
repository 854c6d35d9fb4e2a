"""Whoever answers problems for others to learn from: a checkpoint, an endpoint, or files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ziphius.alignment.endpoint import Client, Endpoint, Said
from ziphius.alignment.questions import open_for_asking
from ziphius.alignment.records import read_records
from ziphius.alignment.rewards.reward import Response
from ziphius.alignment.rollout import Asked
from ziphius.alignment.tasks.problem import Problem
from ziphius.config.distill import DistillConfig
from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.config.run import RunConfig
from ziphius.data.tokenizer import END_THINK, THINK
from ziphius.inference.outputs import CompletionOutput
from ziphius.inference.params import SamplingParams
from ziphius.training.start import checkpoint_sha256


class Teacher(Protocol):
    """Answers problems several times each."""

    @property
    def about(self) -> dict[str, Any]:
        """What a record says of its teacher: a name, and the checkpoint's SHA-256 if it has one."""
        ...

    @property
    def trouble(self) -> str:
        """What kept tries from being answered, in one line; empty where nothing did."""
        ...

    def answer(self, problems: Sequence[Problem], seeds: Sequence[int]) -> list[list[Response]]:
        """Return the answers to every problem; of a try that failed there is none."""
        ...


class CheckpointTeacher:
    """One of our checkpoints, asked as ``config.format`` writes conversations."""

    trouble = ""

    def __init__(self, path: Path, config: DistillConfig, run: RunConfig) -> None:
        self.config = config
        self.llm, self.prompter = open_for_asking(path, run, config.format, config.max_tokens)
        assert self.llm.folder is not None, "it was opened from there"
        self.about = {"checkpoint": str(path), "sha256": checkpoint_sha256(self.llm.folder)}

    def answer(self, problems: Sequence[Problem], seeds: Sequence[int]) -> list[list[Response]]:
        """Sample ``tries`` answers to every problem."""
        config, asked = self.config, [self.prompter.ask(problem) for problem in problems]
        params = [
            SamplingParams(
                n=config.tries,
                seed=seed,
                temperature=config.temperature,
                max_tokens=config.max_tokens,
            )
            for seed in seeds
        ]
        prompts = [{"prompt_token_ids": list(one.prompt)} for one in asked]
        results = self.llm.generate(prompts, params)
        return [
            [_response(one, output) for output in result.outputs]
            for one, result in zip(asked, results, strict=True)
        ]


def _response(asked: Asked, output: CompletionOutput) -> Response:
    text, tokens = asked.opened + output.text, len(output.token_ids)
    return Response(asked.problem, text, tokens, output.finish_reason == "stop")


class EndpointTeacher:
    """A model behind any OpenAI-compatible server, sampled as ``config`` says.

    What does not come in time is no try.
    """

    def __init__(self, endpoint: Endpoint, config: DistillConfig) -> None:
        self.endpoint = replace(
            endpoint, temperature=config.temperature, max_tokens=config.max_tokens
        )
        self.tries = config.tries
        self.about = {"endpoint": endpoint.url, "model": endpoint.model}
        self.answered, self.failed, self.last_problem = 0, 0, ""

    @property
    def trouble(self) -> str:
        """How many tries were not answered, and why the last one was not."""
        return f"{self.failed} tries were not answered: {self.last_problem}" * bool(self.failed)

    def answer(self, problems: Sequence[Problem], seeds: Sequence[int]) -> list[list[Response]]:
        """Ask every problem ``tries`` times, several at a time.

        Raises ZiphiusError where no try was ever answered.
        """
        asked = [
            ([{"role": "user", "content": problem.question}], (seed + number) % 2**31)
            for problem, seed in zip(problems, seeds, strict=True)
            for number in range(self.tries)
        ]
        with Client(self.endpoint) as client:
            said = client.ask(asked)
        answers = [
            [
                self._read(problem, one)
                for one in said[first : first + self.tries]
                if self._came(one)
            ]
            for first, problem in zip(range(0, len(said), self.tries), problems, strict=True)
        ]
        if not self.answered:
            raise ZiphiusError(f"teacher {self.endpoint.url}: no answer: {self.last_problem}")
        return answers

    def _came(self, one: Said) -> bool:
        if one.text is None:
            self.failed, self.last_problem = self.failed + 1, one.problem
            return False
        self.answered += 1
        return True

    def _read(self, problem: Problem, one: Said) -> Response:
        thought = f"{THINK}{one.reasoning}{END_THINK}" if one.reasoning else ""
        return Response(problem, f"{thought}{one.text}", one.tokens, one.finished)


class WorkedTeacher:
    """The tasks themselves: the reasoning that they can write, and the answer. A cold start."""

    trouble = ""

    @property
    def about(self) -> dict[str, Any]:
        """Nobody wrote these answers but the tasks."""
        return {"tasks": "worked"}

    def answer(self, problems: Sequence[Problem], seeds: Sequence[int]) -> list[list[Response]]:
        """Return the worked solution of every problem that has one."""
        return [[self._worked(problem)] if problem.answer else [] for problem in problems]

    def _worked(self, problem: Problem) -> Response:
        thought = f"{THINK}{problem.steps}{END_THINK}" if problem.steps else ""
        text = f"{thought}{problem.answer}"
        return Response(problem, text, len(text.split()))


class FileTeacher:
    """Answers that are there: records whose last message answers the question before it."""

    trouble = ""

    def __init__(self, path: Path) -> None:
        records, digest = read_records([path])
        self.about = {"file": str(path), "sha256": digest}
        self._answers: dict[str, list[str]] = {}
        for record in records:
            *before, last = record.messages
            if last["role"] != "assistant":
                raise BadInput(f"{record.where}: ends without an answer of the assistant")
            asked = [m["content"] for m in before if m["role"] == "user"]
            text, reasoning = last.get("content") or "", last.get("reasoning_content")
            if reasoning is not None:
                text = f"{THINK}{reasoning}{END_THINK}{text}"
            if asked:
                self._answers.setdefault(asked[-1], []).append(text)

    def answer(self, problems: Sequence[Problem], seeds: Sequence[int]) -> list[list[Response]]:
        """Return what the file has for every problem, found by its question."""
        return [
            [Response(p, text, len(text.split())) for text in self._answers.get(p.question, ())]
            for p in problems
        ]
