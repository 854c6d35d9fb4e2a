"""Disks that fill up, files that are damaged, folders that are taken: what a command then says,
and that the run goes on from there as if nothing had happened.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.launch import Command, Patch, flags, quick
from tests.training.support import (
    FIRST_STATE,
    Silent,
    assert_same_run,
    leftovers,
    metrics,
    overrides,
    recipe,
)
from ziphius.training import loop, run
from ziphius.training.folder import RunFolder
from ziphius.training.run import pretrain

STEPS = ("pretrain.steps=14", "run.checkpoint_every=4")


@pytest.fixture(scope="module")
def whole(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(recipe(words, *STEPS), RunFolder(out), Silent())
    return out


def begun(words: Path, out: Path, *more: str) -> list[str]:
    return ["pretrain", "tiny", "--out", str(out), *flags(overrides(words, *STEPS, *more))]


def refusal(*arguments: str, logs: Path, patch: Patch = quick) -> str:
    """Run what ends with bad input: exit code 2 and one line."""
    line = Command(*arguments, logs=logs, patch=patch).line(2)
    assert line.startswith("error: ")
    return line


def goes_on(words: Path, out: Path, whole: Path, logs: Path) -> str:
    """Resume, compare with the uninterrupted run, and return what was shown."""
    command = Command(*begun(words, out), "--resume", logs=logs, patch=quick)
    assert command.code() == 0, command.error()
    for aside in out.glob("stages/pretrain/damaged-*"):
        shutil.rmtree(aside)
    assert_same_run(out, whole)
    return command.shown()


# Full disks


def allow(size: int) -> None:
    """Let the kernel refuse files of more than so many bytes, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def before(owner: object, name: str, step: int, action: Callable[[loop.Loop], None]) -> None:
    """Let something happen before a loop's function is called after a step.

    The checkpoint of an earlier step is there then.
    """
    plain = getattr(owner, name)

    def watched(self: loop.Loop, *arguments: object) -> object:
        if self.state.progress.step == step:
            self.finish_saving()
            action(self)
        return plain(self, *arguments)

    setattr(owner, name, watched)


def no_room_for_weights() -> None:
    quick()
    before(loop.Loop, "save", 8, lambda loop: allow(300_000))


def no_room_for_state() -> None:
    quick()
    before(loop.Loop, "save", 8, lambda loop: allow(400_000))


def no_room_for_half_a_line() -> None:
    quick()
    before(loop.Loop, "_write", 7, lambda loop: allow(loop.folder.metrics.size() + 100))


def no_room_for_the_summary() -> None:
    quick()
    plain = run._finish

    def finish(*args: object, **kwargs: object) -> object:
        allow(1000)
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    run._finish = finish  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("patch", "place", "last"),
    [
        (no_room_for_weights, "step-8: not saved, nothing there was changed", 4),
        (no_room_for_state, "step-8: not saved, nothing there was changed", 4),
        (no_room_for_half_a_line, "free space or permissions are missing", 4),
        (no_room_for_the_summary, "not saved, nothing there was changed", 14),
    ],
)
def test_a_write_that_the_kernel_refuses_ends_in_one_line_and_loses_nothing(
    patch: Patch, place: str, last: int, words: Path, whole: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "run", tmp_path / "logs"
    line = refusal(*begun(words, out), logs=logs, patch=patch)
    assert "File too large" in line
    assert place in line
    assert leftovers(out) == []
    assert f"going on after step {last}" in goes_on(words, out, whole, logs)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_a_disk_that_is_full_at_a_save_ends_in_one_line_and_loses_nothing(
    words: Path, whole: Path, small_disk: Path, tmp_path: Path
) -> None:
    """Two checkpoints fit, the third does not."""
    out, logs = small_disk / "run", tmp_path / "logs"
    line = refusal(*begun(words, out), logs=logs)
    assert "step-12: not saved, nothing there was changed: No space left on device" in line
    assert leftovers(out) == []
    assert [path.name for path in RunFolder(out).checkpoints()] == ["step-8", "step-4"]
    remount(small_disk, "size=20m")
    assert "going on after step 8" in goes_on(words, out, whole, logs)


def fill_up() -> None:
    quick()

    def fill(loop: loop.Loop) -> None:
        with (loop.folder.path.parent / "filler").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(512))
                except OSError:
                    return

    before(loop.Loop, "_write", 6, fill)


def test_a_disk_that_fills_up_between_saves_ends_in_one_line_and_loses_nothing(
    words: Path, whole: Path, small_disk: Path, tmp_path: Path
) -> None:
    out, logs = small_disk / "run", tmp_path / "logs"
    assert "No space left on device" in refusal(*begun(words, out), logs=logs, patch=fill_up)
    assert "No space left on device" in refusal(*begun(words, out), "--resume", logs=logs)
    (small_disk / "filler").unlink()
    remount(small_disk, "size=20m")
    assert "going on after step 4" in goes_on(words, out, whole, logs)


def test_a_read_only_disk_is_told_in_one_line(
    words: Path, whole: Path, small_disk: Path, tmp_path: Path
) -> None:
    out, logs = small_disk / "run", tmp_path / "logs"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("checkpoint", "step-14"))
    remount(small_disk, "ro")
    for arguments in (
        begun(words, small_disk / "new"),
        [*begun(words, out), "--resume"],
        [
            "quickstart",
            "--until",
            "pretrain",
            "--out",
            str(out),
            "--steps",
            "2",
            *flags(overrides(words)),
        ],
    ):
        assert "Read-only file system" in refusal(*arguments, logs=logs)
    remount(small_disk, "rw,size=20m")
    goes_on(words, out, whole, logs)


# Damage


def flip(checkpoint: Path) -> str:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    return "model.safetensors has sha256"


def truncate(checkpoint: Path) -> str:
    os.truncate(checkpoint / "state" / FIRST_STATE, 1000)
    return f"state/{FIRST_STATE} has 1000 bytes instead of"


def lose(checkpoint: Path) -> str:
    (checkpoint / "tokenizer.json").unlink()
    return "tokenizer.json is missing"


@pytest.mark.parametrize("damage", [flip, truncate, lose])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    damage: Callable[[Path], str], words: Path, whole: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "run", tmp_path / "logs"
    shutil.copytree(whole, out)
    said = damage(out / "stages" / "pretrain" / "step-14")
    shown = goes_on(words, out, whole, logs)
    assert f"step-14: files differ from manifest.json: {said}" in shown
    assert "going on after step 12" in shown


def test_without_any_usable_checkpoint_nothing_is_touched(
    words: Path, whole: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "run", tmp_path / "logs"
    shutil.copytree(whole, out)
    for checkpoint in (out / "stages" / "pretrain").iterdir():
        lose(checkpoint)
    line = refusal(*begun(words, out), "--resume", logs=logs)
    assert re.search(r"no checkpoint can be used: .*step-14: .*step-12: ", line)
    assert metrics(out) == metrics(whole)
    assert {path.name for path in (out / "stages" / "pretrain").iterdir()} == {"step-14", "step-12"}


# Folders


def wait_at_step_6() -> None:
    quick()
    before(loop.Loop, "_write", 6, lambda loop: (print("waiting", flush=True), time.sleep(600)))


def test_a_second_process_is_refused_at_once_and_the_first_is_not_disturbed(
    words: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "run", tmp_path / "logs"
    # Nothing is being saved while the others are refused.
    unsaved = "run.checkpoint_every=100"
    first = Command(*begun(words, out, unsaved), logs=logs, patch=wait_at_step_6)
    first.until(lambda: "waiting" in first.shown())
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for arguments in (
        [*begun(words, out), "--resume"],
        [
            "quickstart",
            "--until",
            "pretrain",
            "--out",
            str(out),
            "--steps",
            "2",
            *flags(overrides(words)),
        ],
    ):
        line = refusal(*arguments, logs=logs)
        assert "another process trains into this folder" in line
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    first.process.kill()
    assert first.code() == -9


def test_resume_of_a_new_folder_begins(words: Path, whole: Path, tmp_path: Path) -> None:
    shown = goes_on(words, tmp_path / "deep" / "new", whole, tmp_path / "logs")
    assert "going on" not in shown


def test_resume_with_another_recipe_names_what_differs(
    words: Path, whole: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    changed = ("pretrain.learning_rate=1e-5", "run.seed=4", "run.keep_checkpoints=5")
    line = refusal(*begun(words, whole, *changed), "--resume", logs=tmp_path / "logs")
    assert re.search(r"differs from the run's in pretrain\.learning_rate, run\.seed: go on", line)
    line = refusal(*begun(words, whole), "--resume", "--steps", "99", logs=tmp_path / "logs")
    assert "differs from the run's in pretrain.steps: go on" in line
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_the_command_itself_on_a_full_disk(words: Path, whole: Path, tmp_path: Path) -> None:
    """Once as a user starts it, in a limit that the shell sets."""
    command = [sys.executable, "-m", "ziphius", *begun(words, tmp_path / "run")]
    failed = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: allow(300_000),
        check=False,
    )
    assert failed.returncode == 2, failed.stderr
    assert re.fullmatch(r"error: .*step-4: not saved, .* File too large.*\n", failed.stderr)
    goes_on(words, tmp_path / "run", whole, tmp_path / "logs")
