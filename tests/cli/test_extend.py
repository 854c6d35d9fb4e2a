"""``ziphius extend`` as a user meets it: stopped in a phase, gone on with, asked needles."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.cli.launch import Command, advised, flags, quick
from tests.training.support import Silent, metrics, overrides, recipe
from ziphius.training.folder import RunFolder
from ziphius.training.run import pretrain

SETTINGS = (
    *("pretrain.steps=2", "pretrain.ema_decay=0.0", "model.max_position_embeddings=32"),
    *("extend.lengths=[64, 512]", "extend.batch_sizes=[2, 1]", "extend.steps=[30, 2]"),
    *("run.validate_bytes=2000",),
)


@pytest.fixture(scope="module")
def base(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that is extended."""
    out = tmp_path_factory.mktemp("runs") / "base"
    pretrain(recipe(words, *SETTINGS), RunFolder(out), Silent())
    return out


def test_stopped_in_a_phase_gone_on_with_and_asked(words: Path, base: Path, tmp_path: Path) -> None:
    out, logs = tmp_path / "a long run", tmp_path / "logs"
    settings = flags(overrides(words, *SETTINGS))
    begun = ["extend", "tiny", str(base), "--out", str(out), *settings]
    command = Command(*begun, logs=logs, patch=quick)
    command.until_step(out / "phase-1", 3)
    command.signal(signal.SIGTERM)
    line = command.line(143)
    assert f"ziphius extend '{out}/phase-1/recipe.toml'" in line
    again = Command(*advised(line), "--needles", "1", logs=logs, patch=quick)
    assert again.code() == 0, again.error()
    shown = again.shown()
    assert "phase 1 of 2: rows of 64 tokens" in shown
    assert "going on after step" in shown
    assert "phase 2 of 2: rows of 512 tokens" in shown
    assert "held-out bits per byte of long rows:" in shown
    assert [len(metrics(out / folder)) for folder in ("phase-1", ".")] == [30, 2]
    told = json.loads((out / "needle.json").read_text("utf-8"))
    assert told["lengths"] == [256, 512]
    assert told["trained"] == [64, 512]
    assert "Needles without YaRN" in (out / "report.html").read_text("utf-8")
    (out / "needle.json").unlink()
    short = Command("generate", str(out), "def", "--max-tokens", "2", logs=logs)
    assert short.code() == 0, short.error()


def test_what_cannot_be_extended_is_one_line(words: Path, base: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    settings = overrides(words, *SETTINGS, "extend.factor=2.0")
    begun = ["extend", "tiny", str(base), "--out", str(tmp_path / "run")]
    line = Command(*begun, *flags(settings), logs=logs, patch=quick).line(2)
    assert "extend.lengths: 512 tokens exceed the 64 positions of YaRN over 32" in line
    assert not (tmp_path / "run").exists()
    line = Command("extend", "tiny", str(tmp_path), "--out", str(tmp_path / "run"), logs=logs).line(
        2
    )
    assert "no config.json there" in line
