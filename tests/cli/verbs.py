"""The command line in this process: what tests of verbs share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.launch import flags
from tests.training.support import overrides
from ziphius.cli.app import run


def settings(text: Path, *more: str) -> list[str]:
    return flags(overrides(text, "pretrain.micro_batch_size=2", *more))


def ziphius_exits(*arguments: str) -> int:
    """Run the command line in this process; return its exit code."""
    before = sys.argv
    sys.argv = ["ziphius", *arguments]
    threads = torch.get_num_threads()
    try:
        run()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
        torch.set_num_threads(threads)
    return 0


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run what must be refused: exit code 2 and one line of error, which is returned."""
    code = ziphius_exits(*arguments)
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return err


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def letters(text: str) -> str:
    """Return what no frame, line break or terminal changes."""
    return "".join(c for c in text if c.isascii() and c.isalnum())
