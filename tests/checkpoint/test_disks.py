"""Disks that refuse: one line, and nothing lost."""

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.checkpoint.saves import (
    KEPT,
    MIB,
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
    recover_directory,
    replace_directory,
    write_atomic,
)
from ziphius.config.errors import BadInput, ZiphiusError


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
