"""Saves and removals that die at every step."""

import itertools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.checkpoint import saves
from tests.checkpoint.saves import DIED, KEPT, NEW, OLD, content, old_checkpoint, save_new
from ziphius.checkpoint import files
from ziphius.checkpoint.files import (
    check_manifest,
    recover_directory,
    remove_directory,
    write_atomic,
)

# Ending at a step. A step is a line of files.py, of saves.py, of this file, or of shutil, which
# removes folders.


def follow(
    action: Callable[[], object], at_step: Callable[[int], object], shutil_too: bool = True
) -> None:
    """Run ``action`` and call ``at_step`` with 1, 2, ... before each of its steps."""
    watched = {files.__file__, saves.__file__, __file__} | (
        {shutil.__file__} if shutil_too else set()
    )
    step = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal step
        if frame.f_code.co_filename not in watched or frame.f_code is at_step.__code__:
            return None
        if event == "line":
            step += 1
            at_step(step)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)


def die(action: Callable[[], object], step: int) -> None:
    """Run ``action`` in a child that dies at the given step."""

    def at_step(now: int) -> None:
        if now == step:
            os._exit(DIED)

    process = os.fork()
    if process == 0:
        try:
            follow(action, at_step)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == DIED


def steps_that_change(place: Path, action: Callable[[], object]) -> list[int]:
    """The steps before which the disk differs from what it was at the step before.

    To die at each of them is to die in every state of the disk that ``action`` passes through.
    """
    steps: list[int] = []
    seen: list[object] = [None]

    def at_step(now: int) -> None:
        paths = sorted(place.rglob("*"))
        state = [(str(path), path.lstat().st_ino, path.lstat().st_size) for path in paths]
        if state != seen[-1]:
            steps.append(now)
            seen.append(state)

    follow(action, at_step)
    return steps


def test_a_crash_in_any_state_leaves_the_old_or_the_new_folder(place: Path, swap: str) -> None:
    target = place / "ckpt"
    old_checkpoint(target)
    steps = steps_that_change(place, lambda: save_new(target))
    assert len(steps) > 20
    missing, outcomes = 0, []
    for step in steps:
        shutil.rmtree(target)
        old_checkpoint(target)
        die(lambda: save_new(target), step)
        missing += not target.exists()
        recover_directory(target)
        assert os.listdir(place) == ["ckpt"]
        check_manifest(target)
        assert content(target) in ({**OLD, **KEPT}, {**NEW, **KEPT})
        outcomes.append("model.safetensors" in content(target))
    assert outcomes == sorted(outcomes)  # first the old folder, then the new one, never back
    assert outcomes.count(False) > 10
    assert outcomes.count(True) > 3
    assert bool(missing) == (swap == "two renames")


def test_a_half_removed_folder_is_never_put_back(place: Path, swap: str) -> None:
    """Even if the user removes the new folder after a crash that came after the swap."""
    target = place / "ckpt"
    old_checkpoint(target)
    emptied = 0
    for step in steps_that_change(place, lambda: save_new(target)):
        shutil.rmtree(target, ignore_errors=True)
        old_checkpoint(target)
        die(lambda: save_new(target), step)
        shutil.rmtree(target, ignore_errors=True)
        recover_directory(target)
        emptied += not target.exists()
        assert not target.exists() or content(target) == {**OLD, **KEPT}
    assert emptied > 10


def test_a_crash_in_any_state_of_a_first_save_leaves_nothing_or_all(place: Path) -> None:
    target = place / "deep" / "ckpt"
    steps = steps_that_change(place, lambda: save_new(target))
    outcomes = []
    for step in steps:
        shutil.rmtree(target.parent)
        die(lambda: save_new(target), step)
        recover_directory(target)
        outcomes.append(target.exists())
        if target.exists():
            check_manifest(target)
            assert content(target) == NEW
        target.parent.mkdir(exist_ok=True)
        assert set(os.listdir(target.parent)) <= {"ckpt"}
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) > 5
    assert outcomes.count(True) > 0


def test_a_crash_in_any_state_of_a_removal_leaves_all_or_nothing(place: Path) -> None:
    target = old_checkpoint(place / "ckpt")
    outcomes = []
    for step in steps_that_change(place, lambda: remove_directory(target)):
        shutil.rmtree(target, ignore_errors=True)
        old_checkpoint(target)
        die(lambda: remove_directory(target), step)
        outcomes.append(not target.exists())
        if target.exists():
            check_manifest(target)
            assert content(target) == {**OLD, **KEPT}
        recover_directory(target)
        assert set(os.listdir(place)) <= {"ckpt"}
    assert outcomes == sorted(outcomes)
    assert outcomes.count(True) > 5


def test_a_crash_in_any_state_of_a_file_leaves_the_old_or_the_new_bytes(place: Path) -> None:
    path = place / "state.json"
    path.write_bytes(b"old")
    seen = []
    for step in steps_that_change(place, lambda: write_atomic(path, b"longer")):
        path.write_bytes(b"old")
        die(lambda: write_atomic(path, b"longer"), step)
        seen.append(path.read_bytes())
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {b"old", b"longer"}
    write_atomic(path, b"last")
    assert os.listdir(place) == ["state.json"]  # what dead writers left is gone


def is_interrupted(action: Callable[[], object], step: int) -> bool:
    """Run ``action`` with Ctrl-C at the given step; say whether it came that far."""

    def at_step(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    try:
        # Not within shutil: Python 3.11's rmtree then closes a descriptor twice.
        follow(action, at_step, shutil_too=False)
    except KeyboardInterrupt:
        return True
    return False


def test_ctrl_c_at_any_step_leaves_the_old_or_the_new_folder(place: Path, swap: str) -> None:
    target = place / "ckpt"
    outcomes = []
    for step in itertools.count(1):
        old_checkpoint(target)
        if not is_interrupted(lambda: save_new(target), step):
            break
        assert content(target) in ({**OLD, **KEPT}, {**NEW, **KEPT})  # without any recovery
        check_manifest(target)
        outcomes.append("model.safetensors" in content(target))
        assert outcomes[-1] or os.listdir(place) == ["ckpt"]
        for path in place.iterdir():
            shutil.rmtree(path)
    assert outcomes.count(False) > 100
    assert outcomes.count(True) > 10
