"""A run's folder: what lies where, and how it is written.

recipe.toml                 every setting of the run, resolved
metrics.jsonl               one line an optimizer step
stages/NAME/checkpoint/     the stage's weights as a Hugging Face directory, and its state/
checkpoint/                 the final Hugging Face directory
summary.json                every figure the run printed
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ziphius.checkpoint.files import replace_directory, write_atomic
from ziphius.checkpoint.state import STATE_FOLDER
from ziphius.config.errors import BadInput
from ziphius.config.recipe import Recipe, dump_recipe

_RECIPE, _METRICS, _SUMMARY = "recipe.toml", "metrics.jsonl", "summary.json"


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / _METRICS
        self.checkpoint = path / "checkpoint"

    @classmethod
    def create(cls, path: Path, recipe: Recipe, *, replace: bool = False) -> RunFolder:
        """Begin a run in a folder that is new or empty.

        With ``replace`` an earlier run there moves aside to ``NAME.previous``, which is all that is
        kept of runs before. Raises BadInput for a folder that holds an earlier run (without
        ``replace``) or anything else, and when it cannot be made.
        """
        cls.require_room(path, replace=replace)
        try:
            if path.is_dir() and any(path.iterdir()):
                _move_aside(path)
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(path / _RECIPE, dump_recipe(recipe).encode())
            (path / _METRICS).touch()
        except OSError as error:
            raise BadInput(f"--out {path}: {error.strerror}: choose another folder") from None
        return cls(path)

    @staticmethod
    def require_room(path: Path, *, replace: bool = False) -> None:
        """Raise BadInput unless ``create`` may begin a run there. Nothing is changed."""
        if not path.is_dir():
            if path.exists():
                raise BadInput(f"--out {path}: is a file: choose a folder")
            return
        if any(path.iterdir()):
            if not _is_run(path):
                raise BadInput(f"--out {path}: holds files that are no run: choose another folder")
            if not replace:
                raise BadInput(
                    f"--out {path}: holds a run already: choose another folder or remove it"
                )
            if _previous(path).exists() and not _is_run(_previous(path)):
                raise BadInput(f"--out {path}: {_previous(path)} is no run and in the way: move it")

    def stage(self, name: str) -> Path:
        """Return the checkpoint folder of a stage, its parent made."""
        folder = self.path / "stages" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "checkpoint"

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, whole and on its way to the disk."""
        line = json.dumps(record) + "\n"
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(line)

    def publish(self, stage: str) -> None:
        """Make a stage's checkpoint the run's final one: the same files, without its state."""
        source = self.stage(stage)
        with replace_directory(self.checkpoint) as folder:
            for path in source.iterdir():
                if path.is_file() and path.name != "manifest.json":
                    _link_or_copy(path, folder / path.name)
            assert not (folder / STATE_FOLDER).exists(), "a published checkpoint holds no run state"

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, whole or not at all."""
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        write_atomic(self.path / _SUMMARY, text.encode())


def _is_run(path: Path) -> bool:
    return (path / _RECIPE).is_file() and (path / _METRICS).is_file()


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _move_aside(path: Path) -> None:
    if _previous(path).exists():
        shutil.rmtree(_previous(path))
    path.rename(_previous(path))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
