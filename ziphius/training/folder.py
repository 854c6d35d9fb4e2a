"""A run's folder: what lies where, and how it is written.

recipe.toml                 every setting of the run, resolved
metrics.jsonl               one line an optimizer step
balance.jsonl               the experts' loads and routing biases, now and then
stages/STAGE/step-N/        a checkpoint: a Hugging Face directory, and its state/
checkpoint/                 the final Hugging Face directory
summary.json                every figure the run printed
report.html                 all of this as pictures
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ziphius.checkpoint.files import (
    MANIFEST,
    is_weight_file,
    recover_directory,
    remove_directory,
    replace_directory,
    unfinished_targets,
    write_atomic,
)
from ziphius.checkpoint.folder import CONFIG_FILE, STEP_PREFIX, stage_checkpoints
from ziphius.config.errors import BadInput
from ziphius.config.parallel import ParallelConfig
from ziphius.config.recipe import Recipe, changed_keys, dump_recipe, load_recipe
from ziphius.training.metrics import Lines, Log, NoLines
from ziphius.training.watch import Watch

_RECIPE, _SUMMARY, _LOCK = "recipe.toml", "summary.json", ".lock"

# What may change when a run goes on: it says when something is written, and by how many, not what.
_FREE_KEYS = frozenset(
    (
        *("run.checkpoint_every", "run.keep_checkpoints", "run.validate_every"),
        *("run.tensorboard", "run.cache", "data.workers"),
        *("parallel.deadline", "parallel.comm_sms"),
    )
)
# Settings that a recipe may leave to the machine, and how it says so.
_LEFT_OPEN = {"threads": 0, "kernels": "auto", "products": "auto"}
# What may change when a run moves to another machine, or to other ranks: the numbers then differ in
# their last bits.
_MACHINE_KEYS = frozenset(
    (
        *("run.device", *(f"run.{name}" for name in _LEFT_OPEN)),
        *(f"parallel.{name}" for name in ParallelConfig.model_fields),
    )
)


class RunFolder:
    """The folder of one run.

    By default it must be new. With ``resume`` the run that is there goes on. With ``replace`` it
    moves aside to ``NAME.previous``, where one earlier run is kept; a run that was broken off never
    takes the place of a finished one there. ``job`` names whoever trains, for ``is_of``. ``parts``
    are folders of runs that this one begins with, which lie in its own.
    """

    def __init__(
        self,
        path: Path,
        stage: str = "pretrain",
        *,
        replace: bool = False,
        resume: bool = False,
        job: str = "",
        parts: Iterable[str] = (),
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.parts = frozenset(parts)
        self.replace = replace
        self.resume = resume
        self.job = job
        self.metrics: Log = Lines(self.path / "metrics.jsonl")
        self.balance: Log = Lines(self.path / "balance.jsonl")
        self.events = self.path / "tensorboard"
        self.checkpoint = self.path / "checkpoint"
        self.stage = self.path / "stages" / stage
        self.previous = self.path.with_name(self.path.name + ".previous")

    def require_room(self) -> None:
        """Raise BadInput unless a run may begin or go on here. Nothing is changed."""
        self._require_room(self.replace)
        if (self.path / _LOCK).exists():
            with self._locked():
                pass

    def _require_room(self, replace: bool) -> None:
        with one_line(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise BadInput(f"--out {self.path}: is a file: choose a folder")
            if not set(_names(self.path)) - self.parts:
                return
            if not _is_run(self.path):
                raise BadInput(
                    f"--out {self.path}: holds files that are no run: choose another folder"
                )
            if replace and _names(self.previous) and not _is_run(self.previous):
                raise BadInput(f"--out {self.path}: {self.previous} is no run and in the way")
            if not replace and not self.resume:
                raise BadInput(
                    f"--out {self.path}: holds a run already: go on with it by --resume, or choose "
                    "another folder"
                )

    def agreed(self, recipe: Recipe, watch: Watch) -> Recipe:
        """Return the recipe with which the run here goes on, or begins.

        What ``recipe`` leaves open (threads, kernels, products) is as the run has it; given
        otherwise it is taken, and ``watch`` is told. Raises BadInput that names every other setting
        which differs from the run's.
        """
        if not self.resume or not _is_run(self.path):
            return recipe
        begun = load_recipe(str(self.path / _RECIPE))
        recipe = self.settled(recipe)
        changes = [key for key in changed_keys(begun, recipe) if key not in _FREE_KEYS]
        if moved := [key for key in changes if key in _MACHINE_KEYS]:
            watch.say(
                f"{', '.join(moved)} changed: from here on losses are not bit for bit those of the "
                "run as it began"
            )
        if changes := [key for key in changes if key not in _MACHINE_KEYS]:
            raise BadInput(
                f"--resume {self.path}: the recipe differs from the run's in "
                f"{', '.join(changes)}: go on with {self.path / _RECIPE}, or begin another run"
            )
        return recipe

    def settled(self, recipe: Recipe) -> Recipe:
        """Return a recipe with what it leaves to the machine as the run here has it."""
        begun = load_recipe(str(self.path / _RECIPE))
        left = {
            name: getattr(begun.run, name)
            for name, open_value in _LEFT_OPEN.items()
            if getattr(recipe.run, name) == open_value
        }
        return recipe.model_copy(update={"run": recipe.run.model_copy(update=left)})

    @property
    def finished(self) -> bool:
        """Whether the run here came to its end, with everything written."""
        return _is_finished(self.path) and (self.path / _SUMMARY).is_file()

    def is_of(self, job: str) -> bool:
        """Say whether a job was the last to claim this folder."""
        try:
            return bool(job) and (self.path / _LOCK).read_text("utf-8") == job
        except (OSError, ValueError):
            return False

    @contextmanager
    def claimed(self, recipe: Recipe) -> Iterator[None]:
        """Begin the run, or go on with it, as the only process that trains into this folder.

        An earlier run moves aside, or what died in this one is cleared away; then the recipe is
        written. Raises BadInput as ``require_room`` does, and if another process trains here.
        """
        self.require_room()
        with one_line(self.path):
            recover_directory(self.path)
            if self.replace and _names(self.path):
                with self._locked():  # it moves with the folder
                    self._move_aside()
            self.path.mkdir(parents=True, exist_ok=True)
        with self._locked() as alone:
            self._require_room(replace=False)  # another process may have been faster
            with one_line(self.path):
                (self.path / _LOCK).write_text(self.job, "utf-8")
                # First of all else: only a folder with a recipe is a run.
                self.write_recipe(recipe)
                self.stage.mkdir(parents=True, exist_ok=True)
                for target in (*unfinished_targets(self.stage), self.checkpoint):
                    recover_directory(target, alone=alone)
            yield

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Keep other processes from training into this folder. Raises BadInput if one does.

        It gives whether that is certain: not every system has such locks.
        """
        with one_line(self.path):
            file = (self.path / _LOCK).open("a+")
        with file:
            locked = _lock(file)
            if locked is False or not _is_same(file, self.path / _LOCK):
                raise BadInput(
                    f"--out {self.path}: another process trains into this folder: wait for it, "
                    "stop it, or choose another folder"
                )
            yield locked is True

    def write_recipe(self, recipe: Recipe) -> None:
        """Write recipe.toml, whole or not at all."""
        write_atomic(self.path / _RECIPE, dump_recipe(recipe).encode())

    def checkpoints(self, every: int = 1) -> list[Path]:
        """List the run's checkpoints of multiples of ``every`` steps, the newest first."""
        return [
            checkpoint
            for checkpoint in stage_checkpoints(self.stage)
            if int(checkpoint.name.removeprefix(STEP_PREFIX)) % every == 0
        ]

    def checkpoint_at(self, step: int) -> Path:
        """Return where the checkpoint of a step belongs."""
        return self.stage / f"{STEP_PREFIX}{step}"

    def set_aside(self, checkpoint: Path) -> None:
        """Rename a checkpoint that cannot be used, so that none takes it for a good one."""
        with one_line(checkpoint):
            aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
            if aside.exists():
                remove_directory(aside)
            checkpoint.rename(aside)

    def drop_old(self, keep: int, every: int) -> None:
        """Remove all but the newest ``keep`` checkpoints, and the newest to which a run goes back.

        See ``newest_usable`` for ``every``.
        """
        kept = {*self.checkpoints()[:keep], *self.checkpoints(every)[:1]}
        for checkpoint in self.checkpoints():
            if checkpoint not in kept:
                with suppress(OSError):
                    remove_directory(checkpoint)

    def publish(self, source: Path, files: Mapping[str, str] | None = None) -> None:
        """Make a checkpoint the run's final one: the same files, without its state, and ``files``.

        Weights are shared with it, where the file system can; small files are copies.
        """
        with replace_directory(self.checkpoint) as folder:
            for path in source.iterdir():
                if path.is_file() and path.name != MANIFEST:
                    copy = _link_or_copy if is_weight_file(path.name) else shutil.copy2
                    copy(path, folder / path.name)
            for name, text in (files or {}).items():
                (folder / name).write_text(text, "utf-8")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, whole or not at all."""
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        write_atomic(self.path / _SUMMARY, text.encode())

    def _move_aside(self) -> None:
        recover_directory(self.previous)
        if _is_finished(self.previous) and not _is_finished(self.path):
            remove_directory(self.path)
            return
        if self.previous.exists():
            remove_directory(self.previous)
        self.path.rename(self.previous)


class Onlooker(RunFolder):
    """A run's folder as ranks see it that leave all writing to the first."""

    def __init__(self, path: Path, stage: str = "pretrain") -> None:
        super().__init__(path, stage, resume=True)
        self.metrics, self.balance = NoLines(), NoLines()

    @contextmanager
    def claimed(self, recipe: Recipe) -> Iterator[None]:
        yield

    def write_recipe(self, recipe: Recipe) -> None: ...

    def set_aside(self, checkpoint: Path) -> None: ...

    def drop_old(self, keep: int, every: int) -> None: ...

    def publish(self, source: Path, files: Mapping[str, str] | None = None) -> None: ...

    def write_summary(self, summary: Mapping[str, Any]) -> None: ...


def _names(path: Path) -> list[str]:
    """List a folder, without what a writer that died has left of its recipe, and the lock."""
    if not path.is_dir():
        return []
    left = (f".{_RECIPE}.writing-", _LOCK)
    return [name for name in os.listdir(path) if not name.startswith(left)]


def _is_run(path: Path) -> bool:
    return (path / _RECIPE).is_file()


def _is_finished(path: Path) -> bool:
    return (path / "checkpoint" / CONFIG_FILE).is_file()


def _lock(file: IO[str]) -> bool | None:
    """Lock a file while it is open: False if another process has, None if there are no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _is_same(file: IO[str], path: Path) -> bool:
    """Say whether an open file is still the one at ``path``: its folder may have moved."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Say in one line that a file of the run cannot be written."""
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"{path}: {error.strerror}: free space or permissions are missing; choose another "
            "folder with --out"
        ) from error
