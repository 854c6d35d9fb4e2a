"""Sizes and checksums: bytes that change are found and named."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from tests.checkpoint.saves import KEPT, MIB, NEW, OLD, fill, old_checkpoint
from ziphius.checkpoint.files import (
    check_manifest,
    write_manifest,
)
from ziphius.config.errors import BadInput


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
