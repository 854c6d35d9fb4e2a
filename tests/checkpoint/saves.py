"""An old checkpoint, a new one that takes its place, and what is found of both."""

import subprocess
from pathlib import Path

from ziphius.checkpoint.files import (
    replace_directory,
    write_manifest,
)

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


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid
