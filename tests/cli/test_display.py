"""What is shown survives its terminal, and names commands that can be called."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ziphius.cli.display import Display, program


@pytest.mark.parametrize(
    ("found", "called", "shown"),
    [
        ({"ziphius": "/bin/ziphius"}, "/bin/ziphius", "ziphius"),
        ({"python": sys.executable}, "/lib/ziphius/__main__.py", "python -m ziphius"),
        ({"python": "/usr/bin/python"}, "/lib/ziphius/__main__.py", f"{sys.executable} -m ziphius"),
        ({}, "/lib/ziphius/__main__.py", f"{sys.executable} -m ziphius"),
        ({}, "/opt/bin/ziphius", "/opt/bin/ziphius"),
    ],
)
def test_a_command_that_is_shown_can_be_called(
    found: dict[str, str], called: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", found.get)
    monkeypatch.setattr(sys, "argv", [called])
    assert program() == shown


class Broken(io.StringIO):
    """A file whose writes fail after the first."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.left = error, 1

    def write(self, text: str) -> int:
        if not self.left:
            raise self.error
        self.left -= 1
        return super().write(text)


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(32, "Broken pipe"),
        OSError(5, "Input/output error"),
        OSError(28, "No space left on device"),
        RuntimeError("reentrant call"),
    ],
)
def test_output_that_fails_ends_nothing(error: Exception) -> None:
    console = Console(file=Broken(error))
    with Display(console) as display:
        for text in ("one", "two", "three"):
            display.say(text)
    record = {"step": 1, "loss": 1.0, "bpb": 1.0, "tokens_per_s": 1.0, "mfu": 0.1, "skipped": None}
    display.step(record, 2)


def test_a_path_is_not_taken_for_markup(tmp_path: Path) -> None:
    shown = io.StringIO()
    Display(Console(file=shown)).say(f"{tmp_path}/[bold]x[/bold]")
    assert shown.getvalue().endswith(f"{tmp_path}/[bold]x[/bold]\n")
