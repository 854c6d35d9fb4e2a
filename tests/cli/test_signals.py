"""Ctrl-C and SIGTERM at every stage of a run, on real processes."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import ziphius
from tests.cli.launch import Command, Patch, advised, flags, quick
from tests.training.support import (
    Silent,
    assert_same_run,
    leftovers,
    metrics,
    overrides,
    recipe,
)
from ziphius.cli import display
from ziphius.training import loop, saving, text
from ziphius.training.folder import RunFolder
from ziphius.training.run import pretrain
from ziphius.training.saving import Saver

STEPS = ("pretrain.steps=25", "run.checkpoint_every=4")
SAVED = r"stopped after step (\d+), which is saved; go on with: (.+)"


@pytest.fixture(scope="module")
def whole(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(recipe(words, *STEPS), RunFolder(out), Silent())
    return out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    number: int, code: int, words: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a  run"  # a name that a shell would take apart
    begun = ["pretrain", "tiny", "--out", str(out), *flags(overrides(words, *STEPS))]
    command = Command(*begun, logs=tmp_path / "logs", patch=quick)
    command.until_step(out, 3)
    command.signal(number)
    line = command.line(code)
    said = re.fullmatch(SAVED, line)
    assert said
    assert metrics(out)[-1]["step"] == int(said[1]) >= 3
    assert (out / "stages" / "pretrain" / f"step-{said[1]}" / "manifest.json").is_file()
    assert "finishing this step and saving; once more stops at once" in command.shown()
    if number == signal.SIGINT:  # pasted into a shell, as a user would
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        subprocess.run(
            said[2], shell=True, check=True, timeout=120, env=os.environ | {"PATH": path}
        )
    else:
        again = Command(*advised(line), logs=tmp_path / "logs", patch=quick)
        assert again.code() == 0, again.error()
        assert f"going on after step {said[1]}" in again.shown()
    assert_same_run(out, whole, same_steps=False)
    assert (out / "report.html").is_file()


# A second signal


def slow_step() -> None:
    """Let a step take until the process is stopped."""
    quick()
    plain = loop.train_step

    def train_step(*args: object, **kwargs: object) -> object:
        result = plain(*args, **kwargs)  # type: ignore[arg-type]
        if args[1].steps == 3:  # type: ignore[attr-defined]
            print("waiting", flush=True)
            time.sleep(600)
        return result

    loop.train_step = train_step  # type: ignore[assignment]


def slow_save() -> None:
    """Let a save take long, on a slow disk."""
    quick()
    plain = loop.Loop.save

    def save(self: loop.Loop) -> None:
        if self.state.progress.step == 8:
            self.finish_saving()
            very_slow_disk()
        plain(self)

    loop.Loop.save = save  # type: ignore[method-assign]


def slow_end_of_save() -> None:
    """Let the last files of a save take long, on a disk that has become slow."""
    quick()
    plain = Saver._finish

    def finish(self: Saver, copies: saving._Copies, *arguments: Any) -> None:
        if copies.target.name == "step-8":
            very_slow_disk()
        plain(self, copies, *arguments)

    Saver._finish = finish  # type: ignore[method-assign]


def very_slow_disk() -> None:
    os.fsync = lambda descriptor: (print("waiting", flush=True), time.sleep(1))  # type: ignore[assignment]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("patch", [slow_step, slow_save, slow_end_of_save])
def test_a_second_signal_stops_at_once_and_leaves_nothing_unfinished(
    patch: Patch, number: int, words: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    begun = ["pretrain", "tiny", "--out", str(out), *flags(overrides(words, *STEPS))]
    command = Command(*begun, logs=tmp_path / "logs", patch=patch)
    command.until(lambda: "waiting" in command.shown())
    command.signal(number)
    command.until(lambda: "finishing this step" in command.shown())
    command.signal(number)
    line = command.line(130)
    assert line.startswith("stopped; go on with: ")
    assert leftovers(out) == []
    again = Command(*advised(line), logs=tmp_path / "logs", patch=quick)
    assert again.code() == 0, again.error()
    assert_same_run(out, whole)


def slow_end() -> None:
    """Let the end of the run take until the process is stopped."""
    quick()
    RunFolder.publish = lambda *_: (print("waiting", flush=True), time.sleep(600))  # type: ignore[assignment,method-assign,return-value]


def test_ctrl_c_after_the_last_step_says_how_to_end_the_run(
    words: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    begun = ["pretrain", "tiny", "--out", str(out), *flags(overrides(words, *STEPS))]
    command = Command(*begun, logs=tmp_path / "logs", patch=slow_end)
    command.until(lambda: "waiting" in command.shown())
    command.signal(signal.SIGINT)
    again = Command(*advised(command.line(130)), logs=tmp_path / "logs", patch=quick)
    assert again.code() == 0, again.error()
    assert_same_run(out, whole)


# Before training


def slow_text() -> None:
    """Let the preparation of text take until the process is stopped."""
    plain = text.heldout_rows

    def heldout_rows(*args: object) -> object:
        print("waiting", flush=True)
        time.sleep(600)
        return plain(*args)  # type: ignore[arg-type]

    text.heldout_rows = heldout_rows  # type: ignore[assignment]


@pytest.mark.parametrize("verb", [("pretrain", "tiny"), ("quickstart",)])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_a_signal_before_training_stops_at_once_and_leaves_nothing(
    verb: tuple[str, ...], number: int, code: int, words: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "run"
    command = Command(
        *verb,
        *("--out", str(out), "--steps", "2", *flags(overrides(words))),
        logs=tmp_path / "logs",
        patch=slow_text,
    )
    command.until(lambda: "waiting" in command.shown())
    command.signal(number)
    assert command.code() == code
    assert command.error().strip() == ("stopped" if code == 130 else "")
    assert not out.parent.exists()


# quickstart


def test_an_interrupted_quickstart_says_how_to_go_on_and_ends_as_a_run_does(
    words: Path, tmp_path: Path
) -> None:
    out = tmp_path / "quick"
    begun = [
        "quickstart",
        "--until",
        "pretrain",
        "--out",
        str(out),
        "--steps",
        "20",
        *flags(overrides(words)),
    ]
    command = Command(*begun, logs=tmp_path / "logs", patch=quick)
    command.until_step(out, 3)
    command.signal(signal.SIGINT)
    line = command.line(130)
    assert re.fullmatch(SAVED, line)
    assert advised(line)[:2] == ["pretrain", str(out / "recipe.toml")]
    again = Command(*advised(line), logs=tmp_path / "logs", patch=quick)
    assert again.code() == 0, again.error()
    assert [record["step"] for record in metrics(out)] == list(range(1, 21))
    assert str(out / "report.html") in again.shown()
    assert (out / "report.html").is_file()
    assert ziphius.load(out).config.hidden_size == 32
    assert leftovers(out) == []


# Terminals and pipes


def drain(descriptor: int) -> bytes:
    """Read until the other side is closed."""
    shown = b""
    with suppress(OSError):  # how a terminal ends
        while piece := os.read(descriptor, 2**16):
            shown += piece
    os.close(descriptor)
    return shown


def test_on_a_terminal_the_line_that_moves_ends_and_the_cursor_comes_back(
    words: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ours, theirs = pty.openpty()
    begun = ["pretrain", "tiny", "--out", str(out), *flags(overrides(words, *STEPS))]
    command = Command(*begun, logs=tmp_path / "logs", patch=quick, output=theirs)
    os.close(theirs)
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(drain, ours)
        command.until_step(out, 3)
        command.signal(signal.SIGINT)
        assert re.fullmatch(SAVED, command.line(130))
        shown = reading.result(60)
    assert b"finishing this step and saving" in shown
    hidden, visible = shown.rfind(b"\x1b[?25l"), shown.rfind(b"\x1b[?25h")
    assert -1 < hidden < visible


def test_a_reader_that_ctrl_c_ends_too_does_not_keep_a_run_from_saving(
    words: Path, tmp_path: Path
) -> None:
    """As in ``ziphius pretrain ... | tee log``: the signal ends ``tee`` first."""
    out = tmp_path / "run"
    ours, theirs = os.pipe()
    begun = ["pretrain", "tiny", "--out", str(out), *flags(overrides(words, *STEPS))]
    command = Command(*begun, logs=tmp_path / "logs", patch=quick, output=theirs)
    os.close(theirs)
    command.until_step(out, 3)
    os.close(ours)
    command.signal(signal.SIGINT)
    assert re.fullmatch(SAVED, command.line(130))


def many_lines() -> None:
    """Let the run write more than a pipe holds."""
    quick()
    plain = display.Display.step

    def step(self: display.Display, record: dict[str, Any], steps: int) -> None:
        plain(self, record, steps)
        if record["step"] == 3:
            for _ in range(200):
                self.say("x" * 1000)

    display.Display.step = step  # type: ignore[method-assign]


def test_a_signal_while_output_waits_for_its_reader_saves(words: Path, tmp_path: Path) -> None:
    """As after Ctrl-S, or with a pager that shows the first page."""
    out = tmp_path / "run"
    ours, theirs = os.pipe()
    begun = ["pretrain", "tiny", "--out", str(out), *flags(overrides(words, *STEPS))]
    command = Command(*begun, logs=tmp_path / "logs", patch=many_lines, output=theirs)
    command.until(lambda: not select.select([], [theirs], [], 0)[1])
    time.sleep(0.3)  # until it waits in the middle of a line
    os.close(theirs)
    command.signal(signal.SIGINT)
    with ThreadPoolExecutor() as pool:
        pool.submit(drain, ours)
        said = re.fullmatch(SAVED, command.line(130))
    assert said
    assert said[1] == "3"
