"""Who may train into a folder, what moves aside, and what a death there leaves."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.deaths import every_death
from ziphius.checkpoint.files import MANIFEST
from ziphius.config.errors import BadInput
from ziphius.config.recipe import Recipe, load_recipe
from ziphius.training import folder as module
from ziphius.training.folder import RunFolder

NOBODY = "4194304-00000000-0a0b0c0d"  # a process of another machine


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("tiny", ["run.threads=1"])


def begin(out: Path, recipe: Recipe, *, finished: bool = False, name: str = "") -> Path:
    """Make a run folder, of a run that has ended or not, with a file to know it by."""
    with RunFolder(out).claimed(recipe):
        (out / "metrics.jsonl").write_text(name, "utf-8")
        (out / "stages" / "pretrain" / "step-3").mkdir()
        (out / "stages" / "pretrain" / "step-3" / "config.json").write_text("{}", "utf-8")
    if finished:
        (out / "checkpoint").mkdir()
        (out / "checkpoint" / "config.json").write_text("{}", "utf-8")
    return out


def claims(out: Path, recipe: Recipe, *, replace: bool = False, resume: bool = False) -> None:
    with RunFolder(out, replace=replace, resume=resume).claimed(recipe):
        pass


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".") and name != ".lock"]


def names_of_finished(folder: Path) -> set[str]:
    return {
        (path / "metrics.jsonl").read_text("utf-8")
        for path in folder.iterdir()
        if path.name[0] != "." and (path / "checkpoint" / "config.json").is_file()
    }


# Who may


def test_a_new_folder_becomes_a_run(tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "deep" / "run"
    claims(out, recipe)
    assert load_recipe(str(out / "recipe.toml")) == recipe
    with pytest.raises(BadInput, match="holds a run already: go on with it by --resume"):
        claims(out, recipe)
    claims(out, recipe, resume=True)


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"replace": True}])
def test_a_folder_of_other_files_is_refused(
    how: dict[str, bool], tmp_path: Path, recipe: Recipe
) -> None:
    (tmp_path / "letter.txt").write_text("mine", "utf-8")
    with pytest.raises(BadInput, match="holds files that are no run: choose another folder"):
        claims(tmp_path, recipe, **how)
    with pytest.raises(BadInput, match="is a file: choose a folder"):
        claims(tmp_path / "letter.txt", recipe, **how)
    assert os.listdir(tmp_path) == ["letter.txt"]


def test_a_stranger_beside_it_is_in_the_way_of_a_new_run_only(
    tmp_path: Path, recipe: Recipe
) -> None:
    out = begin(tmp_path / "run", recipe)
    (tmp_path / "run.previous").mkdir()
    (tmp_path / "run.previous" / "letter.txt").write_text("mine", "utf-8")
    with pytest.raises(BadInput, match=r"run\.previous is no run and in the way"):
        claims(out, recipe, replace=True)
    claims(out, recipe, resume=True)
    assert (tmp_path / "run.previous" / "letter.txt").is_file()


@pytest.mark.parametrize("how", [{"resume": True}, {"replace": True}])
def test_only_one_process_trains(how: dict[str, bool], tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "run"
    changed = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": 9})})
    with RunFolder(out).claimed(recipe):
        for ask in (RunFolder(out, **how).require_room, lambda: claims(out, changed, **how)):
            with pytest.raises(BadInput, match="another process trains into this folder"):
                ask()
        assert load_recipe(str(out / "recipe.toml")) == recipe
    claims(out, changed, **how)
    assert load_recipe(str(out / "recipe.toml")) == changed


def before_the_lock(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Let something happen between opening the file of the lock and locking it, once."""
    lock = module._lock
    calls = iter([action])

    def late(file: object) -> object:
        for call in calls:
            call()
        return lock(file)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_lock", late)


def test_a_process_that_was_faster_keeps_its_run(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    before_the_lock(monkeypatch, lambda: begin(out, recipe, name="theirs"))
    with pytest.raises(BadInput, match="holds a run already"):
        claims(out, recipe)
    assert (out / "metrics.jsonl").read_text("utf-8") == "theirs"


@pytest.mark.parametrize("how", [{"resume": True}, {"replace": True}])
def test_a_folder_that_moved_while_it_was_locked_is_not_trained_into(
    how: dict[str, bool], tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = begin(tmp_path / "run", recipe, name="old")

    def replaced() -> None:
        claims(out, recipe, replace=True)
        (out / "metrics.jsonl").write_text("theirs", "utf-8")

    before_the_lock(monkeypatch, replaced)
    with pytest.raises(BadInput, match="another process trains"):
        claims(out, recipe, **how)
    assert (out / "metrics.jsonl").read_text("utf-8") == "theirs"
    assert (tmp_path / "run.previous" / "metrics.jsonl").read_text("utf-8") == "old"


def test_a_run_that_began_after_the_old_one_moved_is_kept(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = begin(tmp_path / "run", recipe, name="old")
    move = RunFolder._move_aside

    def slow(self: RunFolder) -> None:
        move(self)
        begin(out, recipe, name="theirs")

    monkeypatch.setattr(RunFolder, "_move_aside", slow)
    with pytest.raises(BadInput, match="holds a run already"):
        claims(out, recipe, replace=True)
    assert (out / "metrics.jsonl").read_text("utf-8") == "theirs"


def test_a_disk_without_locks_is_trained_into(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    out = begin(tmp_path / "run", recipe)
    left = out / "stages" / "pretrain" / f".step-5.writing-{NOBODY}"
    left.mkdir()
    claims(out, recipe, resume=True)
    assert left.is_dir(), "who knows whether its writer is alive"


# Deaths


def test_a_death_while_a_run_begins_is_no_obstacle(tmp_path: Path, recipe: Recipe) -> None:
    out, left = tmp_path / "runs" / "run", tmp_path / "left"
    out.parent.mkdir()
    every_death(lambda: claims(out, recipe), out.parent, left)
    began = 0
    for state in left.iterdir():
        if (state / "run" / "recipe.toml").exists():
            began += 1
            claims(state / "run", recipe, resume=True)
        else:
            claims(state / "run", recipe)
        assert set(os.listdir(state / "run")) == {".lock", "recipe.toml", "stages"}
    assert 0 < began < len(os.listdir(left))


@pytest.mark.parametrize("now", [True, False])
@pytest.mark.parametrize("previous", [True, False, None])
def test_a_death_while_a_run_moves_aside_is_no_obstacle_and_loses_no_finished_run(
    now: bool, previous: bool | None, tmp_path: Path, recipe: Recipe
) -> None:
    out, left = tmp_path / "runs" / "run", tmp_path / "left"
    if previous is not None:
        begin(out, recipe, finished=previous, name="previous").rename(f"{out}.previous")
    begin(out, recipe, finished=now, name="now")
    before = names_of_finished(out.parent)
    every_death(lambda: claims(out, recipe, replace=True), out.parent, left)
    assert len(os.listdir(left)) > 4
    for state in left.iterdir():
        assert bool(names_of_finished(state)) == bool(before)
        claims(state / "run", recipe, replace=True)
        assert hidden(state) == []
        assert set(os.listdir(state)) <= {"run", "run.previous"}
        assert bool(names_of_finished(state)) == bool(before)


def test_what_dead_writers_of_any_machine_left_is_cleared_away(
    tmp_path: Path, recipe: Recipe
) -> None:
    out = begin(tmp_path / "run", recipe)
    stage = out / "stages" / "pretrain"
    for name in (f".step-5.writing-{NOBODY}", f".step-3.writing-{NOBODY}"):
        shutil.copytree(stage / "step-3", stage / name)
    (stage / "step-3").rename(stage / f".step-3.previous-{NOBODY}")
    (out / f".checkpoint.writing-{NOBODY}").mkdir()
    claims(out, recipe, resume=True)
    assert hidden(stage) == hidden(out) == []
    assert [path.name for path in RunFolder(out).checkpoints()] == ["step-3"]


# Checkpoints


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path: Path, recipe: Recipe) -> None:
    folder = RunFolder(begin(tmp_path / "run", recipe))
    for name in ("step-20", "step-100", "step-x", "damaged-step-7", ".step-8.writing-1"):
        (folder.stage / name).mkdir()
    assert [path.name for path in folder.checkpoints()] == ["step-100", "step-20", "step-3"]
    assert [path.name for path in folder.checkpoints(10)] == ["step-100", "step-20"]
    folder.drop_old(1, 20)
    assert [path.name for path in folder.checkpoints()] == ["step-100"]
    (folder.stage / "step-101").mkdir()
    (folder.stage / "step-102").mkdir()
    folder.drop_old(2, 20)  # the last one to which the run may go back stays
    assert [path.name for path in folder.checkpoints()] == ["step-102", "step-101", "step-100"]
    assert (folder.stage / "damaged-step-7").is_dir()


def test_a_published_checkpoint_shares_its_weights_and_lacks_its_state(
    tmp_path: Path, recipe: Recipe
) -> None:
    folder = RunFolder(begin(tmp_path / "run", recipe))
    source = folder.checkpoint_at(3)
    (source / "model.safetensors").write_bytes(b"weights")
    (source / "state").mkdir()
    folder.publish(source)
    assert set(os.listdir(folder.checkpoint)) == {"config.json", "model.safetensors", MANIFEST}
    shared = os.path.samefile(source / "model.safetensors", folder.checkpoint / "model.safetensors")
    copied = os.path.samefile(source / "config.json", folder.checkpoint / "config.json")
    assert (shared, copied) == (True, False)
