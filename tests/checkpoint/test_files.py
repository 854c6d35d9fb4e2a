"""A folder that takes another's place, and what writers leave behind."""

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.checkpoint.saves import (
    KEPT,
    NEW,
    OLD,
    content,
    dead_process,
    fill,
    old_checkpoint,
    save_new,
)
from ziphius.checkpoint import files
from ziphius.checkpoint.files import (
    check_manifest,
    is_weight_file,
    recover_directory,
    replace_directory,
    unfinished_targets,
    write_atomic,
)
from ziphius.config.errors import BadInput


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
