"""``ziphius dpo`` and ``ziphius reward``: from a checkpoint and a file to a run, or to one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.training.support import overrides
from ziphius.cli.app import run

STAGE = (
    *("sequence_length=64", "batch_size=4", "micro_batch_size=2", "steps=2", "holdout_every=3"),
    *("learning_rate=1e-3", "final_learning_rate=1e-3"),
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [{"prompt": f"say {n}", "chosen": "return x", "rejected": f"{n}"} for n in range(20)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return file


def ziphius(monkeypatch: pytest.MonkeyPatch, verb: str, *arguments: str | Path) -> int:
    """Run a verb in this process; return the exit code."""
    monkeypatch.setattr(sys, "argv", ["ziphius", verb, *map(str, arguments)])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as stopped:
        run()
    torch.set_num_threads(threads)
    return int(stopped.value.code or 0)


def settings(words: Path, verb: str, source: Path | str) -> list[str]:
    own = [f"{verb}.{setting}" for setting in (*STAGE, f"source={source}")]
    values = [*overrides(words, "pretrain.steps=2", "run.kernels=torch"), *own]
    return [part for value in values for part in ("--set", value)]


@pytest.mark.parametrize("verb", ["dpo", "reward"])
def test_a_run_from_a_checkpoint(
    verb: str,
    words: Path,
    start: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    told = settings(words, verb, pairs)
    assert ziphius(monkeypatch, verb, "tiny", start, "--out", out, *told) == 0
    said = capsys.readouterr().out
    assert "held-out share that is judged right" in said
    assert (out / "checkpoint" / "config.json").is_file()
    assert (out / "report.html").is_file()
    # A finished run goes on to nowhere, with the network that it has.
    assert ziphius(monkeypatch, verb, "tiny", start, "--out", out, "--resume", *told) == 0


@pytest.mark.parametrize("verb", ["dpo", "reward"])
def test_wrong_records_are_one_line(
    verb: str,
    words: Path,
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b"}\n', "utf-8")
    told = settings(words, verb, file)
    assert ziphius(monkeypatch, verb, "tiny", start, "--out", tmp_path / "run", *told) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pairs.jsonl: line 1: rejected" in error
    assert not (tmp_path / "run").exists()
