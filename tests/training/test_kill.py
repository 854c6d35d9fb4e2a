"""Processes that are killed: at random moments, and before every change that they make to a disk.

Whatever is left, a fresh process goes on from it, and the run ends as if nothing had happened.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.deaths import every_death
from tests.training.processes import exit_code, start
from tests.training.support import (
    Silent,
    assert_same_run,
    metrics,
    overrides,
    recipe,
    write_text,
)
from ziphius.checkpoint import files
from ziphius.training import loop, run
from ziphius.training.folder import RunFolder
from ziphius.training.run import pretrain

LONG = ("pretrain.steps=12", "run.checkpoint_every=2", "run.validate_every=5")
# Short, with a checkpoint that is dropped: for hundreds of runs.
SHORT = ("pretrain.steps=4", "run.checkpoint_every=1")
KILLS = 25


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder in memory, if there is any: a process that dies loses nothing that it wrote."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def text(place: Path) -> Path:
    return write_text(place / "text")


@pytest.fixture(scope="module")
def long(place: Path, text: Path) -> tuple[Path, float]:
    """A run that nothing interrupts, and its seconds."""
    train_in_a_process(place / "warm", text, SHORT)  # the first one imports for all
    began = time.monotonic()
    train_in_a_process(place / "long", text, LONG)
    return place / "long", time.monotonic() - began


@pytest.fixture(scope="module")
def short(place: Path, text: Path) -> Path:
    train_in_a_process(place / "short", text, SHORT)
    return place / "short"


# Processes


def train(out: Path, text: Path, settings: tuple[str, ...]) -> None:
    """In a process of its own: begin a run, or go on with it."""
    torch.set_num_threads(1)
    run.peak_flops = lambda device, dtype: 1e9  # what it measures takes long
    pretrain(recipe(text, *settings), RunFolder(out, resume=True), Silent())


def train_in_a_process(out: Path, text: Path, settings: tuple[str, ...]) -> None:
    assert exit_code(start(train, out, text, settings)) == 0


# Random moments


def test_runs_killed_at_random_moments_end_as_if_nothing_had_happened(
    place: Path, text: Path, long: tuple[Path, float]
) -> None:
    whole, seconds = long
    moments, kills, number = random.Random(20260711), 0, 0
    while kills < KILLS:
        out, code, number = place / f"random-{number}", -1, number + 1
        while code:  # a run may be killed many times
            process = start(train, out, text, LONG)
            if kills < KILLS:
                process.join(moments.uniform(0, 1.2 * seconds))
                process.kill()
            code = exit_code(process)
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        assert_same_run(out, whole)
        shutil.rmtree(out)


# Every change

Settings = tuple[str, ...]
MOMENTS: dict[str, tuple[Any, str]] = {
    "go on": (run, "_go_on"),
    "save": (loop.Loop, "save"),
    "finish": (run, "_finish"),
}


def whole_call(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a function, and wait for a save that it has begun."""
    plain(*args, **kwargs)
    if isinstance(args[0], loop.Loop):
        args[0].finish_saving()


def die_in(
    name: str, call: int, exchange: bool, out: Path, left: Path, text: Path, settings: Settings
) -> None:
    """In a process of its own: train, and die in every way in one call of one of our functions."""
    owner, attribute = MOMENTS[name]
    plain, calls = getattr(owner, attribute), 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != call:
            return plain(*args, **kwargs)
        if isinstance(args[0], loop.Loop):  # no fork has the thread that writes the one before
            args[0].state.saver.wait()
        every_death(partial(whole_call, plain, *args, **kwargs), out, left)
        os._exit(0)

    setattr(owner, attribute, watched)
    if not exchange:
        files._exchange = lambda a, b: False
    train(out, text, settings)


def assert_every_death_is_survived(
    name: str,
    call: int,
    out: Path,
    text: Path,
    whole: Path,
    *,
    at_least: int,
    dying: Settings = SHORT,
    going_on: Settings = SHORT,
    exchange: bool = True,
) -> None:
    """Die in the ``call``-th call of a function, go on from what is left; it becomes ``whole``."""
    left = out.with_name(f"{out.name}.left")
    assert exit_code(start(die_in, name, call, exchange, out, left, text, dying)) == 0
    states = sorted(left.iterdir(), key=lambda path: int(path.name))
    assert len(states) >= at_least
    for state in states:
        train_in_a_process(state, text, going_on)
        for aside in state.glob("stages/pretrain/damaged-*"):
            shutil.rmtree(aside)
        assert_same_run(state, whole, same_steps=dying[1:] == going_on[1:])
    shutil.rmtree(left)


def test_dying_inside_a_save_and_while_an_old_checkpoint_goes(
    place: Path, text: Path, short: Path
) -> None:
    assert_every_death_is_survived("save", 3, place / "save", text, short, at_least=30)


def test_dying_inside_the_save_of_a_step_that_is_not_saved_again(place: Path, text: Path) -> None:
    """As a signal makes one, and a cluster that does not wait for it."""
    whole, going_on = place / "even", (*SHORT, "run.checkpoint_every=2")
    train_in_a_process(whole, text, going_on)
    assert_every_death_is_survived(
        *("save", 1, place / "signal", text, whole),
        at_least=15,
        dying=(*SHORT, "run.checkpoint_every=3"),
        going_on=going_on,
    )


def test_dying_inside_the_last_save_and_while_an_old_checkpoint_goes(
    place: Path, text: Path, short: Path
) -> None:
    assert_every_death_is_survived("save", 4, place / "last", text, short, at_least=30)


def test_dying_while_a_run_ends(place: Path, text: Path, short: Path) -> None:
    assert_every_death_is_survived("finish", 1, place / "end", text, short, at_least=15)


@pytest.mark.parametrize("exchange", [True, False])
def test_dying_while_an_ended_run_ends_again(
    exchange: bool, place: Path, text: Path, short: Path
) -> None:
    out = place / f"again-{exchange}"
    shutil.copytree(short, out)
    assert_every_death_is_survived("finish", 1, out, text, short, at_least=15, exchange=exchange)


def test_dying_while_a_damaged_checkpoint_is_set_aside(
    place: Path, text: Path, short: Path
) -> None:
    out, stage = place / "damaged", place / "damaged" / "stages" / "pretrain"
    shutil.copytree(short, out)
    shutil.copytree(stage / "step-4", stage / "damaged-step-4")  # from an earlier time
    (stage / "step-4" / "config.json").write_text("{}", "utf-8")
    assert_every_death_is_survived("go on", 1, out, text, short, at_least=5)


# The command line


def test_the_command_killed_at_a_random_moment_goes_on(text: Path, tmp_path: Path) -> None:
    settings = ("pretrain.steps=30", "run.checkpoint_every=3")
    whole, out = tmp_path / "whole", tmp_path / "run"
    pretrain(recipe(text, *settings), RunFolder(whole), Silent())
    values = [part for value in overrides(text, *settings) for part in ("--set", value)]
    command = [sys.executable, "-m", "ziphius", "pretrain", "tiny", "--out", str(out), *values]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (out / "metrics.jsonl").is_file() or not metrics(out):
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    assert len(metrics(out)) < 30
    again = [sys.executable, "-m", "ziphius", "pretrain", str(out / "recipe.toml")]
    subprocess.run([*again, "--out", str(out), "--resume"], check=True, timeout=120)
    assert_same_run(out, whole)
    assert (out / "report.html").is_file()
