"""Later stages over several ranks: the steps are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.alignment.layouts import LAYOUTS, SHARED, close
from tests.alignment.support import REINFORCED, make_start, run_later
from tests.parallel.pool import Pool
from tests.training.support import metrics

TUNED = (
    *("sft.sequence_length=48", "sft.batch_size=8", "sft.micro_batch_size=1", "sft.steps=3"),
    *("sft.learning_rate=1e-3", "sft.holdout_every=6"),
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    said = [("user", "say it"), ("assistant", "return x")]
    messages = [{"role": role, "content": text} for role, text in said]
    lines = [json.dumps({"messages": messages * (1 + n % 3), "n": n}) + "\n" for n in range(40)]
    file.write_text("".join(lines), "utf-8")
    return file


def run(table: str, words: Path, start: Path, out: Path, world: int, *settings: str) -> None:
    """Run a stage on every rank of a world."""
    run_later(table, words, start, out, *settings, *SHARED, world=world)


DISTILLED = (
    *("distill.sequence_length=48", "distill.batch_size=8", "distill.micro_batch_size=1"),
    *("distill.steps=3", "distill.learning_rate=1e-3", "distill.holdout_every=6"),
    "distill.kl_weight=0.5",
)


def run_distilled(
    words: Path, start: Path, teacher: Path, out: Path, world: int, *settings: str
) -> None:
    """Let the student of every rank learn a teacher's thoughts."""
    given = (*DISTILLED, *settings, *SHARED)
    run_later("distill", words, start, out, *given, world=world, teacher=teacher)


@pytest.fixture(scope="module")
def teacher(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another network of the same words."""
    out = tmp_path_factory.mktemp("teachers") / "teacher"
    return make_start(words, out, "run.seed=1", "model.hidden_size=48")


@pytest.fixture(scope="module")
def alone(
    words: Path,
    start: Path,
    chats: Path,
    teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[dict[str, Any]]]:
    """What one process measures of every step."""
    out = tmp_path_factory.mktemp("alone")
    run("grpo", words, start, out / "grpo", 1, *REINFORCED, *ANSWERS)
    run("grpo", words, start, out / "whole", 1, *REINFORCED, *ANSWERS, "grpo.form=sequence")
    run("sft", words, start, out / "sft", 1, *TUNED, f"sft.source={chats}")
    settings = (f"distill.source={chats}",)
    run_distilled(words, start, teacher, out / "distill", 1, *settings)
    return {name: metrics(out / name) for name in ("grpo", "whole", "sft", "distill")}


# Enough rows for the micro-batches of a schedule of two directions.
ANSWERS = ("grpo.questions=8", "grpo.micro_batch_size=1", "grpo.steps=4")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_and_steps_of_grpo_are_those_of_one_process(
    layout: str, pool: Pool, words: Path, start: Path, tmp_path: Path, alone: Any
) -> None:
    settings = (*REINFORCED, *ANSWERS, *LAYOUTS[layout])
    pool.run(2, run, "grpo", words, start, tmp_path / "run", 2, *settings)
    close(metrics(tmp_path / "run"), alone["grpo"])


@pytest.mark.parametrize("layout", ["tensor", "context", "pipeline"])
def test_ratios_of_whole_answers_are_those_of_one_process(
    layout: str, pool: Pool, words: Path, start: Path, tmp_path: Path, alone: Any
) -> None:
    """Sums over answers whose tokens lie on several ranks."""
    settings = (*REINFORCED, *ANSWERS, *LAYOUTS[layout], "grpo.form=sequence")
    pool.run(2, run, "grpo", words, start, tmp_path / "run", 2, *settings)
    close(metrics(tmp_path / "run"), alone["whole"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_of_fine_tuning_are_those_of_one_process(
    layout: str, pool: Pool, words: Path, start: Path, chats: Path, tmp_path: Path, alone: Any
) -> None:
    settings = (*TUNED, *LAYOUTS[layout], f"sft.source={chats}")
    pool.run(2, run, "sft", words, start, tmp_path / "run", 2, *settings)
    close(metrics(tmp_path / "run"), alone["sft"])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tensor"])
def test_steps_of_distillation_are_those_of_one_process(
    layout: str,
    pool: Pool,
    words: Path,
    start: Path,
    chats: Path,
    teacher: Path,
    tmp_path: Path,
    alone: Any,
) -> None:
    """The teacher is whole on every rank; its thoughts are of this rank's tokens."""
    settings = (*LAYOUTS[layout], f"distill.source={chats}")
    pool.run(2, run_distilled, words, start, teacher, tmp_path / "run", 2, *settings)
    found = metrics(tmp_path / "run")
    assert found[0]["divergence"] > 1e-3, "there is something to learn"
    close(found, alone["distill"])
