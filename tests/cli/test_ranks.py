"""Faults of runs of several ranks: what the terminal says, and that the run goes on from there."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.launch import Command, Patch, flags, quick
from tests.cli.ranks import Ranks, rank
from tests.training.support import (
    Silent,
    assert_same_run,
    leftovers,
    metrics,
    overrides,
    recipe,
)
from ziphius.training import loop, run, saving
from ziphius.training.folder import RunFolder
from ziphius.training.run import pretrain

# The same rows a step, however many ranks share them.
STEPS = (
    *("pretrain.steps=12", "run.checkpoint_every=4", "precision.compute=float64"),
    *("pretrain.batch_size=12", "pretrain.micro_batch_size=2"),
)
FOUR = ("parallel.pp=2", "parallel.ep=2")
# How a run that lost ranks may go on.
FEWER: dict[int, tuple[str, ...]] = {
    3: ("parallel.pp=1", "parallel.ep=1"),
    2: ("parallel.pp=1", "parallel.ep=1", "parallel.tp=2"),
}
# What a job may take to notice, on a machine that does much else.
AT_ONCE = 15


def begun(words: Path, out: Path, *more: str) -> list[str]:
    settings = overrides(words, *STEPS, *FOUR, *more)
    return ["pretrain", "tiny", "--out", str(out), *flags(settings)]


@pytest.fixture(scope="module")
def whole(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of four ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("runs")
    with Ranks(*begun(words, folder / "whole"), world=4, logs=folder / "logs", patch=quick) as job:
        assert job.codes() == [0] * 4, job.errors()
        assert job.errors() == []
    return folder / "whole"


def goes_on(words: Path, out: Path, whole: Path, logs: Path, *more: str) -> str:
    """Resume on four ranks, compare with the run that nothing interrupts; return what was shown."""
    again = [*begun(words, out, *more), "--resume"]
    with Ranks(*again, world=4, logs=logs, patch=quick) as job:
        assert job.codes() == [0] * 4, job.errors()
        shown = job.shown()
    for aside in out.glob("stages/pretrain/damaged-*"):
        shutil.rmtree(aside)
    assert_same_run(out, whole, same_steps=False)
    return shown


def assert_same_losses(out: Path, whole: Path) -> None:
    """Compare the lines of runs over different ranks."""
    found, expected = metrics(out), metrics(whole)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        for key, value in other.items():
            near = isinstance(value, float)
            assert one[key] == (pytest.approx(value, rel=1e-9) if near else value), key


def test_ranks_together_are_one_process(words: Path, whole: Path, tmp_path: Path) -> None:
    pretrain(recipe(words, *STEPS), RunFolder(tmp_path / "run"), Silent())
    assert_same_losses(whole, tmp_path / "run")


# Lost ranks


def after(step: int, action: Callable[[], Any]) -> None:
    """Let something happen in the middle of the step that follows a step.

    The checkpoints before it are there by then.
    """
    plain, make_step = loop.train_step, loop.Loop._step

    def step_when_saved(self: loop.Loop, *args: Any) -> Any:
        if self.state.progress.step == step:
            self.finish_saving()
        return make_step(self, *args)

    def train_step(passes: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if optimizer.steps == step:
            optimizer.begin = lambda *_: (type(optimizer).begin(optimizer, *_), action())
        return plain(passes, optimizer, *args, **kwargs)

    quick()
    loop.train_step = train_step
    loop.Loop._step = step_when_saved  # type: ignore[method-assign]


def die() -> None:
    after(6, lambda: rank() == 2 and os.kill(os.getpid(), signal.SIGKILL))


@pytest.fixture(scope="module")
def torn(words: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What is left of a run whose rank 2 died in step 7, and what it said."""
    folder = tmp_path_factory.mktemp("torn")
    with Ranks(*begun(words, folder / "run"), world=4, logs=folder / "logs", patch=die) as job:
        job.until_step(folder / "run", 6)
        began = time.monotonic()
        said = job.line(1, but=[2])
        assert time.monotonic() - began < AT_ONCE
        assert job.commands[2].code() == -signal.SIGKILL
    return folder / "run", said


def test_a_rank_that_dies_ends_all_and_the_line_names_rank_axis_and_step(
    torn: tuple[Path, str],
) -> None:
    out, said = torn
    found = re.fullmatch(
        r"error: rank [013]: [a-z_ ]+.* over \w+ \(ranks [\d ]+\) failed at step 7: .*"
        r"; no word from rank 2; go on with: (?:torchrun|\S+ -m torch\.distributed\.run) "
        r"--nproc-per-node 4 -m ziphius pretrain "
        rf"{out}/recipe\.toml --out {out} --resume",
        said,
    )
    assert found, said
    assert len(metrics(out)) == 6


@pytest.mark.parametrize("world", FEWER)
def test_a_run_goes_on_over_fewer_ranks_with_the_same_losses(
    world: int, torn: tuple[Path, str], words: Path, whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(torn[0], tmp_path / "run")
    again = [*begun(words, out, *FEWER[world]), "--resume"]
    with Ranks(*again, world=world, logs=tmp_path / "logs", patch=quick) as job:
        assert job.codes() == [0] * world, job.errors()
        assert "going on after step 4" in job.shown()
        assert "parallel.ep, parallel.pp" in job.shown()
    assert_same_losses(out, whole)


def test_torchs_own_collectives_are_named_and_give_no_warnings(words: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "run", ("parallel.pp=1", "parallel.ep=1", "parallel.sharding=fsdp")
    with Ranks(*begun(words, out, *more), world=4, logs=tmp_path / "logs", patch=die) as job:
        said = job.line(1, but=[2])
    assert re.search(
        r" over shard \(ranks 0 1 2 3\) failed at step 7: .*; no word from rank 2", said
    )


def die_in_a_save() -> None:
    quick()
    plain = saving.Saver._files

    def files(self: saving.Saver, copies: Any, folder: Path) -> Any:
        if copies.target.name == "step-8" and rank() == 3:
            time.sleep(0.5)  # the others train on
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, copies, folder)

    saving.Saver._files = files  # type: ignore[method-assign]


def test_a_rank_that_dies_in_a_save_leaves_the_checkpoint_before(
    words: Path, whole: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "run", tmp_path / "logs"
    with Ranks(*begun(words, out), world=4, logs=logs, patch=die_in_a_save) as job:
        assert " failed at step " in job.line(1, but=[3])
    assert "going on after step 4" in goes_on(words, out, whole, logs)


def freeze() -> None:
    after(6, lambda: rank() == 1 and os.kill(os.getpid(), signal.SIGSTOP))


def test_a_rank_that_freezes_is_waited_for_until_the_deadline_and_named(
    words: Path, whole: Path, tmp_path: Path
) -> None:
    out, logs, deadline = tmp_path / "run", tmp_path / "logs", "parallel.deadline=4"
    with Ranks(*begun(words, out, deadline), world=4, logs=logs, patch=freeze) as job:
        job.until_step(out, 6)
        began = time.monotonic()
        assert [job.commands[other].code() for other in (0, 2, 3)] == [1, 1, 1]
        assert 3 < time.monotonic() - began < 4 + AT_ONCE
        [said] = job.errors()
        assert re.search(r"rank [023]: .* failed at step 7: .*; no word from rank 1[,;]", said)
        job.commands[1].process.kill()
    assert "going on after step 4" in goes_on(words, out, whole, logs)


# Disks and damage


def full_on_rank_3() -> None:
    quick()
    plain = saving.Saver._write

    def write(self: saving.Saver, copies: Any) -> None:
        if copies.target.name == "step-8" and rank() == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        plain(self, copies)

    saving.Saver._write = write  # type: ignore[method-assign]


def test_a_full_disk_during_a_save_on_one_rank_ends_all_alike(
    words: Path, whole: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "run", tmp_path / "logs"
    with Ranks(*begun(words, out), world=4, logs=logs, patch=full_on_rank_3) as job:
        said = job.line(2)
    assert "step-8: not saved, nothing there was changed: File too large on rank 3" in said
    assert leftovers(out) == []
    assert [path.name for path in RunFolder(out).checkpoints()] == ["step-4"]
    assert "going on after step 4" in goes_on(words, out, whole, logs)


def no_room_for_a_line() -> None:
    quick()
    plain = loop.Loop._write

    def write(self: loop.Loop, *args: Any) -> None:
        if self.state.progress.step == 7 and rank() == 0:
            size = self.folder.metrics.size() + 100
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        plain(self, *args)

    loop.Loop._write = write  # type: ignore[method-assign]


def no_room_at_the_end() -> None:
    quick()
    plain = run._finish

    def finish(*args: Any, **kwargs: Any) -> Any:
        if rank() == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return plain(*args, **kwargs)

    run._finish = finish


@pytest.mark.parametrize(
    ("patch", "place", "last"),
    [
        (no_room_for_a_line, "free space or permissions are missing", 4),
        (no_room_at_the_end, "not saved, nothing there was changed", 12),
    ],
)
def test_what_the_first_rank_cannot_write_ends_all_alike(
    patch: Patch, place: str, last: int, words: Path, whole: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "run", tmp_path / "logs"
    with Ranks(*begun(words, out), world=4, logs=logs, patch=patch) as job:
        said = job.line(2)
    assert place in said
    assert "File too large" in said
    assert f"going on after step {last}" in goes_on(words, out, whole, logs)


def lose_weights(checkpoint: Path) -> str:
    lost = sorted(checkpoint.glob("model-*.safetensors"))[2]
    lost.unlink()
    return f"{lost.name} is missing"


def lose_state(checkpoint: Path) -> str:
    lost = sorted((checkpoint / "state").glob("*.safetensors"))[-1]
    lost.unlink()
    return f"state/{lost.name} is missing"


@pytest.mark.parametrize("lose", [lose_weights, lose_state])
def test_a_checkpoint_with_a_missing_shard_is_named_and_the_one_before_it_used(
    lose: Callable[[Path], str], words: Path, whole: Path, tmp_path: Path
) -> None:
    out, logs = shutil.copytree(whole, tmp_path / "run"), tmp_path / "logs"
    said = lose(out / "stages" / "pretrain" / "step-12")
    shown = goes_on(words, out, whole, logs)
    assert f"step-12: files differ from manifest.json: {said}" in shown
    assert "going on after step 8" in shown


def test_without_any_usable_checkpoint_all_ranks_refuse_in_one_line(
    words: Path, whole: Path, tmp_path: Path
) -> None:
    out, logs = shutil.copytree(whole, tmp_path / "run"), tmp_path / "logs"
    stage = out / "stages" / "pretrain"
    shutil.rmtree(stage / "step-8")
    lose_state(stage / "step-12")
    with Ranks(*begun(words, out), "--resume", world=4, logs=logs, patch=quick) as job:
        assert re.search(r"no checkpoint can be used: .*step-12: .*is missing", job.line(2))
    assert os.listdir(stage) == ["step-12"]
    assert metrics(out) == metrics(whole)


# Signals


def test_a_signal_to_one_rank_saves_on_all_and_the_run_goes_on_bit_for_bit(
    words: Path, whole: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "run", tmp_path / "logs"
    with Ranks(*begun(words, out), world=4, logs=logs, patch=quick) as job:
        job.until_step(out, 3)
        job.signal(signal.SIGTERM, [2])
        said = job.line(143)
    found = re.fullmatch(r"stopped after step (\d+), which is saved; go on with: .+", said)
    assert found
    assert metrics(out)[-1]["step"] == int(found[1]) >= 3
    assert f"going on after step {found[1]}" in goes_on(words, out, whole, logs)


# What is refused


@pytest.mark.parametrize(
    ("more", "place"),
    [
        (["--set", "parallel.pp=3"], "parallel: .*does not divide 4 processes"),
        (["--set", "model.nothing=3"], "model.nothing"),
        (["--set", "data.source=/nowhere"], "/nowhere"),
        (["--nothing"], "No such option"),
        ([], "holds a run already"),
    ],
)
def test_what_cannot_be_is_told_once(
    more: list[str], place: str, words: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run" if more else whole
    with Ranks(*begun(words, out), *more, world=4, logs=tmp_path / "logs", patch=quick) as job:
        assert re.match(f"error: .*{place}", job.line(2))


def wait_at_step_6() -> None:
    after(5, lambda: (print("waiting", flush=True), time.sleep(600)))


def test_a_second_job_is_refused_and_the_first_is_not_disturbed(
    words: Path, tmp_path: Path
) -> None:
    out, unsaved = tmp_path / "run", "run.checkpoint_every=100"
    with Ranks(
        *begun(words, out, unsaved), world=4, logs=tmp_path / "1", patch=wait_at_step_6
    ) as first:
        first.commands[0].until(lambda: first.shown().count("waiting") == 4)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with Ranks(
            *begun(words, out, unsaved), "--resume", world=4, logs=tmp_path / "2", patch=quick
        ) as second:
            assert "another process trains into this folder" in second.line(2)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        assert all(command.process.is_alive() for command in first.commands)


def test_an_environment_without_a_place_to_meet_is_told_in_one_line(
    words: Path, tmp_path: Path
) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2"}
    given = begun(words, tmp_path / "run", "parallel.pp=1", "parallel.ep=1")
    command = Command(*given, logs=tmp_path / "logs", patch=quick, environment=environment)
    assert "rank 0: not all processes have come: " in command.line(1)
    assert "MASTER_ADDR" in command.error()
