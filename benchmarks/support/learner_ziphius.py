"""Our GRPO, a step a request: ``learner_ziphius.py CHECKPOINT JOB CACHE``.

``JOB`` is a file with ``rl.Job``; compiled kernels are kept in ``CACHE``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learner_trl import share_of_vowels
from protocol import serve
from turns import Turns


class Learner:
    def __init__(self, checkpoint: str, job: dict[str, Any], cache: str) -> None:
        from ziphius.config.recipe import load_recipe
        from ziphius.training.start import open_start

        self.job, self.start = job, open_start(Path(checkpoint))
        answers = job["questions"] * job["group"]
        room = job["prompt_tokens"] + job["max_tokens"]
        settings = {
            "run.threads": job["threads"],
            "run.cache": cache,
            "run.checkpoint_every": 10**6,
            "precision.compute": "float32",
            "grpo.steps": job["most_steps"],
            "grpo.questions": job["questions"],
            "grpo.group": job["group"],
            "grpo.max_tokens": job["max_tokens"],
            "grpo.sequence_length": job["rows_of"] * room,
            "grpo.batch_size": -(-answers // job["rows_of"]),
            "grpo.micro_batch_size": 8,
            "grpo.learning_rate": job["learning_rate"],
            "grpo.final_learning_rate": job["learning_rate"],
            "grpo.kl_weight": 0.0,
            "grpo.form": "batch",
        }
        self.recipe = load_recipe("tiny", [f"{name}={value}" for name, value in settings.items()])
        self.turns = Turns(self._train)
        self.recipe = self.start.into(self.recipe)

    def _train(self) -> None:
        from ziphius.training.folder import RunFolder
        from ziphius.training.run import train

        folder = RunFolder(Path(tempfile.mkdtemp()) / "run", "grpo")
        train(self.recipe, self._stage, folder, _Follower(self.turns))

    def _stage(self, recipe: Any, watch: Any) -> Any:
        from ziphius.alignment.reinforce import reinforcing
        from ziphius.alignment.rollout import Asked, Judgement
        from ziphius.alignment.tasks.problem import Problem
        from ziphius.data.tokenizer import BOS_ID

        tokenizer, questions = self.start.tokenizer, self.job["questions"]

        def ask(rollout: int, place: int) -> Asked:
            text = self.job["prompts"][rollout * questions + place]
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert ids[0] == BOS_ID, "the chat format begins with it"
            return Asked(Problem(task="vowels", question=text, answer="", key=text), ids)

        def judge(responses: Sequence[Any]) -> list[Judgement]:
            values = [share_of_vowels(response.text) for response in responses]
            return [Judgement(value, {"vowels": value}, False) for value in values]

        return reinforcing(recipe, self.start, watch, ask, judge, "vowels")

    def step(self) -> dict[str, Any]:
        return self.turns.step()

    def about(self) -> dict[str, Any]:
        import torch

        return {"torch": torch.__version__}


class _Follower:
    """Tells the turns of every step."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def say(self, text: str) -> None:
        print(text, flush=True)

    def step(self, record: dict[str, Any], steps: int) -> None:
        told = {key: record[key] for key in ("sampling_seconds", "reward", "groups_left_out")}
        self.turns.finished(**told, tokens=record["sampled_tokens"])


if __name__ == "__main__":
    checkpoint, job, cache = sys.argv[1:]
    serve(lambda: Learner(checkpoint, json.loads(Path(job).read_text("utf-8")), cache))
