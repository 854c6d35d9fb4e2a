"""What tests of later stages share: a small checkpoint to begin with, and something to learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.training.support import Silent, overrides, recipe
from ziphius.alignment.distill import distilling
from ziphius.alignment.dpo import preferring
from ziphius.alignment.questions import Prompter
from ziphius.alignment.reinforce import reinforcing
from ziphius.alignment.reward_model import scoring
from ziphius.alignment.rewards.reward import Response
from ziphius.alignment.rollout import Asked, Judgement
from ziphius.alignment.sft import fine_tuning
from ziphius.alignment.tasks.find import find_task
from ziphius.alignment.tasks.problem import problem_at
from ziphius.config.recipe import Recipe, load_recipe
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.training.folder import RunFolder
from ziphius.training.run import Trained, pretrain, train
from ziphius.training.stage import Stage
from ziphius.training.start import Start, open_start
from ziphius.training.watch import Watch

REINFORCED = (
    *("grpo.steps=4", "grpo.updates=2", "grpo.questions=3", "grpo.group=4", "grpo.max_tokens=12"),
    *("grpo.sequence_length=96", "grpo.batch_size=2", "grpo.micro_batch_size=2"),
    *("grpo.learning_rate=1e-3", "grpo.final_learning_rate=1e-3", "run.checkpoint_every=2"),
    *("precision.compute=float32", "run.kernels=torch"),
)


def make_start(words: Path, out: Path, *more: str) -> Path:
    """Pre-train a small network for two steps; return its run folder."""
    settings = ("pretrain.steps=2", "model.max_position_embeddings=256", *more)
    pretrain(recipe(words, *settings), RunFolder(out), Silent())
    return out


def write_chats(file: Path, answers: Sequence[Mapping[str, str]]) -> Path:
    """Write conversations of one turn: numbers from 0 are asked for, and the answers given."""
    turns = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", **answer}]
        for n, answer in enumerate(answers)
    ]
    file.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), "utf-8")
    return file


def later(words: Path, *more: str) -> Recipe:
    """Return the recipe of a small later stage."""
    return load_recipe("tiny", overrides(words, "pretrain.steps=2", *more))


def judge(responses: Sequence[Response]) -> list[Judgement]:
    """Like answers by how many small letters they have: something that is soon learned."""
    shares = [sum(c.islower() for c in r.text) / max(1, len(r.text)) for r in responses]
    return [Judgement(share, {"letters": share}, share > 0.5) for share in shares]


def by_letters(recipe: Recipe, start: Start, watch: Watch) -> Stage:
    """Return a stage of GRPO whose questions are sums, and whose reward is letters."""
    prompter, task = Prompter(start.tokenizer, "v3"), find_task("remainders")
    assert recipe.grpo is not None
    questions = recipe.grpo.questions

    def ask(rollout: int, place: int) -> Asked:
        return prompter.ask(problem_at(task, 0, "train", rollout * questions + place))

    return reinforcing(recipe, start, watch, ask, judge, "letters")


# How each stage is prepared, and in which dimensions its network differs from the checkpoint's.
PREPARE: dict[str, Callable[[Recipe, Start, Watch], Stage]] = {
    "sft": fine_tuning,
    "distill": partial(distilling, teacher=None),
    "dpo": preferring,
    "reward": scoring,
    "grpo": by_letters,
}
NETWORK = {"reward": {"num_labels": 1}}


def run_later(
    table: str,
    words: Path,
    start: Path,
    out: Path,
    *settings: str,
    teacher: Path | None = None,
    world: int = 1,
    resume: bool = False,
    watch: Silent | None = None,
) -> Trained:
    """Run a small later stage, on this rank of a world."""
    begun = open_start(start)
    recipe = begun.into(later(words, *settings), NETWORK.get(table, {}))
    prepare = PREPARE[table] if teacher is None else partial(distilling, teacher=teacher)
    return train(
        recipe,
        lambda settled, watch: prepare(settled, begun, watch),
        RunFolder(out, table, resume=resume),
        watch or Silent(),
        mesh=make_mesh(Layout.of(recipe.parallel, world), device=recipe.run.device),
    )


def reinforce(words: Path, start: Path, out: Path, *more: str, **how: Any) -> Trained:
    """Run a small stage of GRPO."""
    return run_later("grpo", words, start, out, *REINFORCED, *more, **how)
