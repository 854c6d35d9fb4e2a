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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ziphius.checkpoint.config_json import CONFIG_FILE
from ziphius.checkpoint.files import MANIFEST, is_weight_file, replace_directory, write_atomic
from ziphius.config.errors import BadInput
from ziphius.config.recipe import Recipe, dump_recipe

_RECIPE, _METRICS, _SUMMARY = "recipe.toml", "metrics.jsonl", "summary.json"


class RunFolder:
    """The folder of one run.

    With ``replace`` a run that is there already moves aside to ``NAME.previous``, where one earlier
    run is kept; a run that was broken off never takes the place of a finished one there.
    """

    def __init__(self, path: Path, *, replace: bool = False) -> None:
        self.path = Path(os.path.abspath(path))
        self.replace = replace
        self.metrics = self.path / _METRICS
        self.checkpoint = self.path / "checkpoint"
        self.previous = self.path.with_name(self.path.name + ".previous")

    def require_room(self) -> None:
        """Raise BadInput unless a run may begin here. Nothing is changed."""
        with _one_line(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise BadInput(f"--out {self.path}: is a file: choose a folder")
            if not _names(self.path):
                return
            if not _is_run(self.path):
                raise BadInput(
                    f"--out {self.path}: holds files that are no run: choose another folder"
                )
            if not self.replace:
                raise BadInput(
                    f"--out {self.path}: holds a run already: choose another folder or remove it"
                )
            if _names(self.previous) and not _is_run(self.previous):
                raise BadInput(f"--out {self.path}: {self.previous} is no run and in the way")

    def create(self, recipe: Recipe) -> None:
        """Begin the run: make room, and write its recipe."""
        self.require_room()
        with _one_line(self.path):
            if _names(self.path):
                self._move_aside()
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_recipe(recipe)
            self.metrics.touch()

    def write_recipe(self, recipe: Recipe) -> None:
        """Write recipe.toml, whole or not at all."""
        write_atomic(self.path / _RECIPE, dump_recipe(recipe).encode())

    def stage(self, name: str) -> Path:
        """Return the checkpoint folder of a stage, its parent made."""
        folder = self.path / "stages" / name
        with _one_line(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder / "checkpoint"

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, in one write."""
        with _one_line(self.metrics), self.metrics.open("ab", buffering=0) as file:
            file.write((json.dumps(record) + "\n").encode())

    def publish(self, stage: str) -> None:
        """Make a stage's checkpoint the run's final one: the same files, without its state.

        Weights are shared with the stage's, where the file system can; small files are copies.
        """
        source = self.stage(stage)
        with replace_directory(self.checkpoint) as folder:
            for path in source.iterdir():
                if path.is_file() and path.name != MANIFEST:
                    copy = _link_or_copy if is_weight_file(path.name) else shutil.copy2
                    copy(path, folder / path.name)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, whole or not at all."""
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        write_atomic(self.path / _SUMMARY, text.encode())

    def _move_aside(self) -> None:
        if _is_finished(self.previous) and not _is_finished(self.path):
            shutil.rmtree(self.path)
            return
        if self.previous.exists():
            shutil.rmtree(self.previous)
        self.path.rename(self.previous)


def _names(path: Path) -> list[str]:
    """List a folder, without what a writer that died has left of its recipe."""
    if not path.is_dir():
        return []
    return [name for name in os.listdir(path) if not name.startswith(f".{_RECIPE}.writing-")]


def _is_run(path: Path) -> bool:
    return (path / _RECIPE).is_file()


def _is_finished(path: Path) -> bool:
    return (path / "checkpoint" / CONFIG_FILE).is_file()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Say in one line that a file of the run cannot be written."""
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"{path}: {error.strerror}: free space or permissions are missing; choose another "
            "folder with --out"
        ) from error
