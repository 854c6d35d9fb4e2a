"""Saves that die at every step, disks that fill up, and bytes that change."""

import errno
import hashlib
import itertools
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ziphius.checkpoint import files
from ziphius.checkpoint.files import (
    check_manifest,
    is_weight_file,
    recover_directory,
    remove_directory,
    replace_directory,
    unfinished_targets,
    write_atomic,
    write_manifest,
)
from ziphius.config.errors import BadInput, ZiphiusError

OLD = {
    "config.json": b'{"old": 1}',
    "model-00001-of-00002.safetensors": b"old one",
    "model-00002-of-00002.safetensors": b"old two",
    "model.safetensors.index.json": b"old index",
}
KEPT = {"README.md": b"mine", "state/loader.json": b"7"}
NEW = {"config.json": b'{"new": 1}', "model.safetensors": b"new weights"}
DIED = 3
MIB = 2**20


def fill(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    found.pop("manifest.json", None)
    return found


def old_checkpoint(target: Path) -> Path:
    write_manifest(fill(target, {**OLD, **KEPT}))
    return target


def save_new(target: Path) -> None:
    with replace_directory(target) as folder:
        for name, data in NEW.items():
            with open(folder / name, "wb") as file:
                file.write(data[:3])
                file.write(data[3:])


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of putting the new folder in place; the second is for disks without the first."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    return str(request.param)


# Ending at a step. A step is a line of files.py, of this file, or of shutil, which removes folders.


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in memory, if there is any, and without flushing, for hundreds of saves.

    A process that dies loses nothing that it wrote; only a machine that dies does.
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        dir=memory if os.access(memory, os.W_OK) else tmp_path
    ) as name:
        yield Path(name)


def follow(
    action: Callable[[], object], at_step: Callable[[int], object], shutil_too: bool = True
) -> None:
    """Run ``action`` and call ``at_step`` with 1, 2, ... before each of its steps."""
    watched = {files.__file__, __file__} | ({shutil.__file__} if shutil_too else set())
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


def test_readers_always_find_a_folder_while_it_is_replaced(tmp_path: Path) -> None:
    target = old_checkpoint(tmp_path / "ckpt")
    if not files._exchange(target, old_checkpoint(tmp_path / "other")):
        pytest.skip("this file system cannot exchange two names in one step")

    def save_often() -> None:
        for _ in range(60):
            save_new(target)

    process = os.fork()
    if not process:
        try:
            save_often()
        finally:
            os._exit(0)
    looks = 0
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        assert (target / "config.json").exists()
        looks += 1
    assert looks > 10


def test_everything_is_flushed_before_the_swap_and_the_swap_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: str
) -> None:
    """Otherwise a power failure could leave names without contents."""
    flushed: list[int | str] = []
    really_swap = files._swap

    def note_swap(*paths: Path) -> None:
        really_swap(*paths)
        flushed.append("swap")

    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(os.fstat(number).st_ino))
    monkeypatch.setattr(files, "_swap", note_swap)
    target = old_checkpoint(tmp_path / "ckpt")
    flushed.clear()
    save_new(target)
    before, after = set(flushed[: flushed.index("swap")]), flushed[flushed.index("swap") :]
    assert {path.stat().st_ino for path in [target, *target.rglob("*")]} <= before
    assert tmp_path.stat().st_ino in after


def test_an_exchange_that_fails_says_so_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert not files._exchange(tmp_path / "a", tmp_path / "none")
    assert os.listdir(tmp_path) == ["a"]


# Replacing


def test_the_old_folder_gives_what_the_new_one_lacks(tmp_path: Path, swap: str) -> None:
    target = old_checkpoint(tmp_path / "ckpt")
    fill(target, {"tokenizer.json": b"words", "pytorch_model.bin": b"pickle"})
    fill(target, {"state/model.safetensors": b"moments"})
    (target / "link").symlink_to("tokenizer.json")
    (target / "folder link").symlink_to("state")
    (target / "broken").symlink_to("nowhere")
    (target / "empty").mkdir()
    inode = (target / "tokenizer.json").stat().st_ino
    save_new(target)
    assert content(target) == {
        **NEW,
        **KEPT,
        "tokenizer.json": b"words",
        "state/model.safetensors": b"moments",
        "link": b"words",
    }
    assert (target / "tokenizer.json").stat().st_ino == inode  # shared, not copied
    assert os.readlink(target / "folder link") == "state"
    assert os.readlink(target / "broken") == "nowhere"
    assert (target / "empty").is_dir()
    assert os.listdir(tmp_path) == ["ckpt"]
    check_manifest(target)


def test_nothing_is_carried_over_when_not_asked(tmp_path: Path) -> None:
    target = old_checkpoint(tmp_path / "ckpt")
    with replace_directory(target, keep_unknown=False) as folder:
        fill(folder, NEW)
    assert content(target) == NEW


def test_what_the_new_folder_has_is_not_overwritten(tmp_path: Path) -> None:
    target = old_checkpoint(tmp_path / "ckpt")
    with replace_directory(target) as folder:
        fill(folder, {**NEW, "README.md": b"newer", "state": b"now a file"})
    assert content(target) == {**NEW, "README.md": b"newer", "state": b"now a file"}


def test_a_disk_without_hard_links_gets_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refuse)
    target = old_checkpoint(tmp_path / "ckpt")
    save_new(target)
    assert content(target) == {**NEW, **KEPT}


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), OSError(5000, "odd")])
def test_an_error_in_the_block_passes_and_changes_nothing(
    tmp_path: Path, error: BaseException
) -> None:
    target = old_checkpoint(tmp_path / "ckpt")

    def fail() -> None:
        with replace_directory(target) as folder:
            fill(folder, NEW)
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert content(target) == {**OLD, **KEPT}
    assert os.listdir(tmp_path) == ["ckpt"]


def test_the_folder_is_a_hidden_sibling_and_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    with replace_directory(target) as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith(f".ckpt.writing-{os.getpid()}-")
        assert os.listdir(folder) == []
        fill(folder, NEW)
        assert not target.exists()
    assert content(target) == NEW


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    real = old_checkpoint(tmp_path / "disk" / "ckpt")
    link = tmp_path / "link"
    link.symlink_to(real)
    save_new(link)
    assert link.is_symlink()
    assert content(real) == {**NEW, **KEPT}


def test_permissions_follow_the_umask_or_the_old_folder(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        save_new(tmp_path / "first")
        old_checkpoint(tmp_path / "second").chmod(0o755)
        save_new(tmp_path / "second")
        write_atomic(tmp_path / "file", b"")
        (tmp_path / "file").chmod(0o604)
        write_atomic(tmp_path / "file", b"")
    finally:
        os.umask(umask)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in os.listdir(tmp_path)}
    assert modes == {"first": 0o750, "second": 0o755, "file": 0o604}
    assert stat.S_IMODE((tmp_path / "first" / "manifest.json").stat().st_mode) == 0o640


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    folder = fill(tmp_path / "photos", {"a.jpg": b"x"})
    for target, words in [
        (file, "is a file"),
        (folder, "no config.json"),
        (Path("/proc"), "mount"),
    ]:
        with pytest.raises(BadInput, match=words) as caught, replace_directory(target):
            raise AssertionError("the block must not run")
        assert str(target) in str(caught.value)
    assert content(folder) == {"a.jpg": b"x"}
    (tmp_path / "empty").mkdir()
    save_new(tmp_path / "empty")
    assert content(tmp_path / "empty") == NEW


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("model.safetensors", True),
        ("model-00001-of-000163.safetensors", True),
        ("model.safetensors.index.json", True),
        ("pytorch_model-00001-of-00002.bin", True),
        ("pytorch_model.bin.index.json", True),
        ("adapter_model.safetensors", False),
        ("tokenizer.model", False),
        ("config.json", False),
    ],
)
def test_which_files_hold_weights(name: str, weight: bool) -> None:
    assert is_weight_file(name) == weight


# Leftovers


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_only_the_leftovers_of_dead_writers_are_removed(tmp_path: Path) -> None:
    target = old_checkpoint(tmp_path / "ckpt")
    here, elsewhere = files._machine(), "0" * 8
    living = [f".ckpt.writing-{os.getpid()}-{here}-0a0b0c0d"]
    foreign = [f".ckpt.writing-{dead_process()}-{elsewhere}-0a0b0c0d"]
    others = [f".other.writing-{dead_process()}-{here}-0a0b0c0d", ".ckpt.writing-notes", "x"]
    dead = [
        f".ckpt.writing-{dead_process()}-{here}-0a0b0c0d",
        f".ckpt.previous-{dead_process()}-{here}-0a0b0c0d",
    ]
    for name in living + foreign + others + dead:
        fill(tmp_path / name, OLD)
    recover_directory(target)
    assert set(os.listdir(tmp_path)) == {"ckpt", *living, *foreign, *others}
    assert content(target) == {**OLD, **KEPT}


def test_whoever_is_alone_removes_the_leftovers_of_every_machine(tmp_path: Path) -> None:
    target, lost = old_checkpoint(tmp_path / "ckpt"), tmp_path / "lost"
    tag = f"{os.getpid()}-00000000-0a0b0c0d"
    fill(tmp_path / f".ckpt.writing-{tag}", NEW)
    old_checkpoint(tmp_path / f".lost.previous-{tag}")
    fill(tmp_path / ".notes.writing-mine", NEW)
    assert unfinished_targets(tmp_path) == [target, lost]
    for path in (target, lost):
        recover_directory(path, alone=True)
        assert content(path) == {**OLD, **KEPT}
    assert set(os.listdir(tmp_path)) == {"ckpt", "lost", ".notes.writing-mine"}
    assert unfinished_targets(tmp_path) == unfinished_targets(tmp_path / "none") == []


def test_an_old_folder_of_another_machine_is_put_back_after_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SWAP_SECONDS", 0.05)
    old_checkpoint(tmp_path / f".ckpt.previous-{os.getpid()}-00000000-0a0b0c0d")
    recover_directory(tmp_path / "ckpt")
    assert content(tmp_path / "ckpt") == {**OLD, **KEPT}


def test_recovery_of_nothing_does_nothing(tmp_path: Path) -> None:
    recover_directory(tmp_path / "no" / "folder")
    recover_directory(tmp_path / "ckpt")
    assert os.listdir(tmp_path) == []


# Disks that refuse


def one_line(message: str) -> None:
    assert "\n" not in message
    assert "writing-" not in message  # the hidden name would only puzzle
    assert "nothing there was changed" in message


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel itself refuses to let a file grow beyond ``size``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_kernel_stops_leaves_the_old_folder(tmp_path: Path) -> None:
    target = old_checkpoint(tmp_path / "ckpt")
    with (
        pytest.raises(BadInput, match="File too large") as caught,
        file_size_limit(MIB),
        replace_directory(target) as folder,
    ):
        fill(folder, {"model.safetensors": b"x" * (MIB + 1)})
    one_line(str(caught.value))
    assert f"{MIB:,} bytes were written before it" in str(caught.value)
    assert caught.value.exit_code == 2
    assert content(target) == {**OLD, **KEPT}
    assert os.listdir(tmp_path) == ["ckpt"]
    with pytest.raises(BadInput, match="File too large"), file_size_limit(MIB):
        write_atomic(target / "README.md", b"x" * (MIB + 1))
    assert content(target) == {**OLD, **KEPT}
    assert set(os.listdir(target)) == {*OLD, "README.md", "state", "manifest.json"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full_leaves_the_old_folder(small_disk: Path) -> None:
    target = old_checkpoint(small_disk / "ckpt")
    with (
        pytest.raises(BadInput, match="No space left on device") as caught,
        replace_directory(target) as folder,
    ):
        fill(folder, {"model.safetensors": b"x" * MIB})
    one_line(str(caught.value))
    assert content(target) == {**OLD, **KEPT}
    assert os.listdir(small_disk) == ["ckpt"]
    save_new(target)  # the room is free again
    check_manifest(target)


def test_a_read_only_disk_is_told_and_can_be_read(small_disk: Path) -> None:
    target = old_checkpoint(small_disk / "ckpt")
    fill(small_disk / f".ckpt.writing-{dead_process()}-{files._machine()}-0a0b0c0d", OLD)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(BadInput, match="Read-only file system") as caught:
        save_new(target)
    one_line(str(caught.value))
    recover_directory(target)
    check_manifest(target)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, BadInput),
        (errno.EDQUOT, BadInput),
        (errno.EACCES, BadInput),
        (errno.EROFS, BadInput),
        (errno.EIO, ZiphiusError),
    ],
)
@pytest.mark.parametrize("function", ["mkdir", "fsync", "rename"])
def test_every_refusal_is_one_line_with_the_right_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type, function: str
) -> None:
    target = tmp_path / "ckpt"
    with monkeypatch.context() as patch:

        def refuse(*given: object, **_: object) -> None:
            name = given[0] if isinstance(given[0], Path | str) else None
            raise OSError(code, os.strerror(code), name)

        patch.setattr(os, function, refuse)
        with pytest.raises(ZiphiusError, match=os.strerror(code)) as caught:
            save_new(target)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(str(target))
    one_line(str(caught.value))
    assert os.listdir(tmp_path) == []


# The manifest


def test_the_manifest_lists_every_file_with_size_and_sha256(tmp_path: Path) -> None:
    big = os.urandom(MIB) * 9  # longer than one chunk
    folder = fill(tmp_path, {**NEW, **KEPT, "big": big, "empty": b""})
    (folder / "link").symlink_to("big")
    write_manifest(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in {**NEW, **KEPT, "big": big, "empty": b""}.items()
    }
    check_manifest(folder)
    write_manifest(folder)  # does not list itself
    assert json.loads((folder / "manifest.json").read_text()) == manifest


def test_one_changed_byte_is_found_and_named(tmp_path: Path) -> None:
    target = old_checkpoint(tmp_path)
    shard = target / "model-00002-of-00002.safetensors"
    shard.write_bytes(b"old tWo")
    with pytest.raises(BadInput) as caught:
        check_manifest(target)
    message = str(caught.value)
    assert "model-00002-of-00002.safetensors has sha256" in message
    for text in (b"old two", b"old tWo"):
        assert hashlib.sha256(text).hexdigest()[:16] in message
    assert "model-00001" not in message
    check_manifest(target, checksums=False)  # the sizes are right
    check_manifest(target, only=["config.json", "not listed"])
    with pytest.raises(BadInput, match="model-00002"):
        check_manifest(target, only=[shard.name])


def test_missing_and_truncated_files_are_named_without_reading_them(tmp_path: Path) -> None:
    target = old_checkpoint(tmp_path)
    (target / "config.json").write_bytes(b"{")
    (target / "state" / "loader.json").unlink()
    (target / "README.md").unlink()
    (target / "README.md").mkdir()
    with pytest.raises(BadInput) as caught:
        check_manifest(target, checksums=False)
    message = str(caught.value)
    assert "config.json has 1 bytes instead of 10" in message
    assert "state/loader.json is missing" in message
    assert "README.md is missing" in message
    assert "\n" not in message


def test_many_damaged_files_make_a_short_message(tmp_path: Path) -> None:
    fill(tmp_path, {f"f{index:03d}": b"x" for index in range(50)})
    write_manifest(tmp_path)
    for index in range(50):
        (tmp_path / f"f{index:03d}").unlink()
    with pytest.raises(BadInput, match=r"f000 is missing.*and 42 more"):
        check_manifest(tmp_path)


def test_folders_without_a_manifest_and_extra_files_pass(tmp_path: Path) -> None:
    check_manifest(fill(tmp_path / "foreign", OLD))
    check_manifest(tmp_path / "none")
    target = old_checkpoint(tmp_path / "ours")
    fill(target, {"notes.txt": b"mine", "sub/x": b"y"})
    check_manifest(target)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 2, "files": {}}', '{"format": 1, "files": {"a": 1}}']
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match=r"manifest\.json: is damaged"):
        check_manifest(tmp_path)
