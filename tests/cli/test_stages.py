"""Later stages by the command line, in processes of their own: killed, and what they measure."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.alignment.support import REINFORCED, write_chats
from tests.cli.launch import Command, flags, quick
from tests.training.support import assert_same_run, metrics, overrides

REWARDED = (*REINFORCED, "grpo.steps=12", "grpo.tasks=remainders", "grpo.rewards=language:en")
TOLD = (
    *("sft.sequence_length=64", "sft.batch_size=2", "sft.micro_batch_size=2", "sft.epochs=2"),
    *("run.checkpoint_every=2", "run.kernels=torch"),
)
ANSWERED = 5


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    return write_chats(file, [{"content": f"{n} and {n}, said twice"} for n in range(24)])


def begun(stage: str, words: Path, start: Path, chats: Path, out: Path) -> list[str]:
    own = REWARDED if stage == "grpo" else (*TOLD, f"sft.source={chats}")
    values = overrides(words, "pretrain.steps=2", *own)
    return [stage, "tiny", str(start), "--out", str(out), *flags(values)]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_killed_and_resumed_a_stage_is_the_same_to_the_bit(
    stage: str, words: Path, start: Path, chats: Path, tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    whole, out = tmp_path / "whole", tmp_path / "run"
    uninterrupted = Command(*begun(stage, words, start, chats, whole), logs=logs, patch=quick)
    assert uninterrupted.code() == 0, uninterrupted.error()
    steps = metrics(whole)
    assert len(steps) >= 10
    if stage == "grpo":
        assert any(line["groups_left_out"] < 1 for line in steps), "something is learned"
    given = begun(stage, words, start, chats, out)
    command = Command(*given, logs=logs, patch=quick)
    command.until_step(out, ANSWERED)
    command.signal(signal.SIGKILL)
    assert command.code() == -signal.SIGKILL
    again = Command(*given, "--resume", logs=logs, patch=quick)
    assert again.code() == 0, again.error()
    assert "going on after step" in again.shown()
    assert_same_run(out, whole)


def test_answers_before_and_after_are_kept(words: Path, start: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = begun("grpo", words, start, tmp_path, out)
    asked = ("--set", "grpo.steps=2", "--measure", "remainders,sums", "--problems", "4")
    command = Command(*given, *asked, logs=tmp_path / "logs", patch=quick)
    assert command.code() == 0, command.error()
    found = json.loads((out / "answers.json").read_text("utf-8"))
    assert list(found) == ["before", "after"]
    for figures in found.values():
        assert figures["accuracy"].keys() == figures["lengths"].keys() == {"remainders", "sums"}
        assert all(0 < length <= 12 for length in figures["lengths"].values())
        assert figures["style"]["unfinished"] > 0  # a model that has learned nothing goes on
    assert "remainders, right" in command.shown()
