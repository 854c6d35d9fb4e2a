"""Saving while a run goes on: what is copied, one at a time, and faults on any rank."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.pool import Pool
from tests.training.spread import NUMBERS, Spread, spread
from tests.training.support import Silent, leftovers
from ziphius.checkpoint.files import check_manifest, recover_directory
from ziphius.config.errors import ZiphiusError
from ziphius.parallel.collectives import Lost
from ziphius.training import saving
from ziphius.training.folder import RunFolder
from ziphius.training.state import newest_usable

LAYOUT = {"ep": 2}
SECONDS = 30


@contextmanager
def held_back(run: Spread) -> Iterator[threading.Event]:
    """Let the thread that saves wait, before it writes anything, until the event is set."""
    gate, plain = threading.Event(), run.saver._write

    def write(copies: Any) -> None:
        assert gate.wait(SECONDS)
        plain(copies)

    run.saver._write = write  # type: ignore[method-assign]
    try:
        yield gate
    finally:
        gate.set()


def outcome(run: Spread) -> str:
    """Return what waiting for a save ends with."""
    try:
        run.saver.wait()
    except ZiphiusError as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# While the run goes on


def train_meanwhile(folder: Path) -> tuple[bool, list[str]]:
    """Change everything and communicate while a save is under way."""
    run = spread(LAYOUT)
    run.fill()
    with held_back(run) as gate:
        run.save(folder / "step-7")
        with torch.no_grad():
            for _, weight in run.saver.weights():
                weight.add_(1)
            for piece in run.saver.held_state(run.optimizer, run.average):
                piece.data.mul_(2)
        x = run.mesh["world"].all_reduce(torch.ones(1000))
        absent = not (folder / "step-7").exists()
        gate.set()
        for _ in range(20):
            x = run.mesh["world"].all_reduce(x)
    run.saver.wait()
    run.saver.load(folder / "step-7", run.optimizer, run.average, NUMBERS)
    return absent, run.wrong()


def test_a_save_is_of_the_moment_it_was_asked_for(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(2, train_meanwhile, tmp_path) == [(True, [])] * 2
    assert leftovers(tmp_path) == []


def save_twice(folder: Path) -> tuple[float, bool]:
    run = spread(LAYOUT)
    run.fill()
    with held_back(run) as gate:
        run.save(folder / "step-1")
        threading.Timer(1.0, gate.set).start()
        began = time.perf_counter()
        run.save(folder / "step-2")
        waited = time.perf_counter() - began
        first = (folder / "step-1" / "config.json").is_file()
    run.saver.wait()
    check_manifest(folder / "step-2")
    return waited, first


def test_a_second_save_waits_for_the_first(pool: Pool, tmp_path: Path) -> None:
    for waited, first in pool.run(2, save_twice, tmp_path):
        assert waited > 0.9
        assert first


def save_at_once(folder: Path) -> tuple[bool, list[str]]:
    run = spread({"tp": 2})
    run.fill()
    run.save(folder / "step-1", at_once=True)
    there = (folder / "step-1" / "manifest.json").is_file()
    run.save(folder / "step-2")
    run.saver.wait()
    return there, run.wrong()


def test_a_save_at_once_is_the_same_and_there_when_it_returns(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(2, save_at_once, tmp_path) == [(True, [])] * 2
    assert contents(tmp_path / "step-1") == contents(tmp_path / "step-2")


def given_up(folder: Path) -> tuple[str, list[str]]:
    run = spread(LAYOUT)
    run.fill()
    with held_back(run) as gate:
        run.save(folder / "step-1")
        threading.Timer(0.5, gate.set).start()
        run.saver.abandon()
    run.mesh["world"].barrier()
    found = sorted(os.listdir(folder))
    run.save(folder / "step-2")
    return outcome(run), found


def test_a_run_that_fails_leaves_nothing_of_a_save_under_way(pool: Pool, tmp_path: Path) -> None:
    for after, found in pool.run(2, given_up, tmp_path):
        assert found == []
        assert after == "saved"
    check_manifest(tmp_path / "step-2")


# Faults


def elsewhere(folder: Path) -> str:
    """Rank 1 is on a machine that has another disk there."""
    run = spread(LAYOUT)
    run.fill()
    if run.mesh.rank == 1:
        plain = run.saver._files
        run.saver._files = lambda copies, new: plain(copies, new.parent / "other")  # type: ignore[method-assign]
    run.save(folder / "step-1")
    return outcome(run)


def test_a_disk_that_not_all_ranks_see_is_told(pool: Pool, tmp_path: Path) -> None:
    for failed in pool.run(2, elsewhere, tmp_path):
        assert failed.startswith(f"BadInput: {tmp_path / 'step-1'}: rank 1 does not see the folder")
    assert os.listdir(tmp_path) == []


def full(folder: Path, place: int, layout: dict[str, int]) -> tuple[str, str, list[str]]:
    """Save, then save again with a disk that takes no more on one rank, then once more."""
    run = spread(layout)
    run.fill()
    run.save(folder / "step-1")
    run.saver.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.mesh.rank == place:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        run.save(folder / "step-2")
        failed = outcome(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.mesh["world"].barrier()
    names = sorted(os.listdir(folder))
    run.mesh["world"].barrier()
    run.save(folder / "step-3")
    return failed, outcome(run), names


@pytest.mark.parametrize("layout", [LAYOUT, {"tp": 2}], ids=["ep", "pieces travel"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_nothing_else(
    place: int, layout: dict[str, int], pool: Pool, tmp_path: Path
) -> None:
    for failed, after, names in pool.run(2, full, tmp_path, place, layout):
        assert failed.startswith(f"BadInput: {tmp_path / 'step-2'}: not saved, nothing there was")
        assert f"File too large on rank {place}" in failed
        assert "free more space" in failed
        assert "\n" not in failed
        assert names == ["step-1"]
        assert after == "saved"
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-3"]
    check_manifest(tmp_path / "step-1")


def broken(folder: Path, place: int, what: str) -> tuple[str, str]:
    run = spread({"tp": 2})
    run.fill()
    plain = getattr(saving, what)

    def fail(*args: Any) -> None:
        raise RuntimeError("on\npurpose")

    if run.mesh.rank == place:
        setattr(saving, what, fail)
    try:
        run.save(folder / "step-1")
        failed = outcome(run)
    finally:
        setattr(saving, what, plain)
    run.save(folder / "step-2")
    return failed, outcome(run)


@pytest.mark.parametrize(
    ("place", "what"),
    [(1, "write_rectangles"), (0, "write_rectangles"), (0, "save_tokenizer"), (0, "write_index")],
)
def test_whatever_fails_on_one_rank_is_told_on_all_in_one_line(
    place: int, what: str, pool: Pool, tmp_path: Path
) -> None:
    for failed, after in pool.run(2, broken, tmp_path, place, what):
        assert failed.startswith("ZiphiusError: ")
        assert "on purpose" in failed
        assert "\n" not in failed
        assert after == "saved"
    assert os.listdir(tmp_path) == ["step-2"]


def unusable(folder: Path) -> str:
    run = spread(LAYOUT)
    run.save(folder / "file")
    return outcome(run)


def test_a_target_that_cannot_be_replaced_is_refused_on_all_ranks(
    pool: Pool, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for failed in pool.run(2, unusable, tmp_path):
        assert failed.startswith("BadInput: ")
        assert "is a file, so no checkpoint can be saved there" in failed
    assert (tmp_path / "file").read_text() == "mine"


def missing_number(folder: Path) -> str:
    run = spread(LAYOUT)
    run.fill()
    plain = run.optimizer.held_moments
    run.optimizer.held_moments = (  # type: ignore[method-assign]
        lambda *args: list(plain(*args))[run.mesh.rank :]
    )
    run.save(folder / "step-1")
    return outcome(run)


def test_a_state_in_which_something_is_missing_is_no_checkpoint(pool: Pool, tmp_path: Path) -> None:
    for failed in pool.run(2, missing_number, tmp_path):
        assert "not every number of first." in failed
    assert os.listdir(tmp_path) == []


def frozen(folder: Path) -> tuple[str, float]:
    run = spread(LAYOUT, mesh={"saving_deadline": 3})
    run.fill()
    began = time.perf_counter()
    if run.mesh.rank == 0:
        run.save(folder / "step-1")
    found = outcome(run)
    took = time.perf_counter() - began
    run.mesh["world"].barrier()
    return found, took


def test_a_rank_that_does_not_come_is_waited_for_so_long(pool: Pool, tmp_path: Path) -> None:
    (found, took), _ = pool.run(2, frozen, tmp_path)
    assert found.startswith("Lost: rank 0: ")
    assert " over saving (ranks 0 1) failed" in found
    assert 2 < took < 20
    assert os.listdir(tmp_path) == []


def killed(folder: Path, place: int) -> None:
    """A rank dies when it has written its weights; the other writes down what it is told."""
    run = spread(LAYOUT)
    run.fill()
    run.save(folder / "step-1")
    run.saver.wait()
    if run.mesh.rank == place:
        saving.write_rectangles = lambda *args: os._exit(1)
    run.save(folder / "step-2")
    try:
        run.saver.wait()
    except Lost as error:
        (folder / "told").write_text(str(error))


@pytest.mark.parametrize("place", [0, 1])
def test_a_rank_that_dies_in_a_save_leaves_the_checkpoint_before(
    place: int, tmp_path: Path
) -> None:
    dying = Pool(2)
    try:
        # The pipe may end before its process has.
        with pytest.raises((AssertionError, EOFError), match=r"hangs or is gone|^$"):
            dying.run(2, killed, tmp_path, place)
    finally:
        dying.close()
    if place == 1:
        assert "failed at step" in (tmp_path / "told").read_text()
    (tmp_path / "told").unlink(missing_ok=True)
    assert set(os.listdir(tmp_path)) >= {"step-1"}
    assert not (tmp_path / "step-2").exists()
    recover_directory(tmp_path / "step-2")
    assert os.listdir(tmp_path) == ["step-1"]
    check_manifest(tmp_path / "step-1")


# Which checkpoint


def written(stage: Path) -> None:
    run = spread(LAYOUT, sizes={"max_shard_bytes": 20_000, "file_bytes": 30_000})
    run.fill()
    for step in (2, 4, 6):
        run.save(stage / f"step-{step}", format=2, step=step)
    run.saver.wait()


def newest(out: Path) -> tuple[str, int, list[str], list[str]]:
    run = spread({})
    watch = Silent()
    saved, damaged = newest_usable(RunFolder(out, resume=True), watch, axis=run.saver.axis)
    assert saved is not None
    run.saver.load(saved.folder, run.optimizer, run.average, saved.numbers)
    assert run.wrong() == []
    return saved.folder.name, saved.numbers["step"], [str(p.name) for p in damaged], watch.said


def test_a_missing_or_damaged_shard_is_named_on_all_ranks_and_the_one_before_used(
    pool: Pool, tmp_path: Path
) -> None:
    stage = tmp_path / "stages" / "pretrain"
    stage.mkdir(parents=True)
    pool.run(2, written, stage)
    lost = sorted((stage / "step-6" / "state").glob("*.safetensors"))[3]
    lost.unlink()
    shard = sorted((stage / "step-4").glob("*.safetensors"))[2]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    for rank, (name, step, damaged, said) in enumerate(pool.run(3, newest, tmp_path)):
        assert (name, step, damaged) == ("step-2", 2, ["step-6", "step-4"])
        if rank == 0:
            assert f"state/{lost.name} is missing" in said[0]
            assert f"{shard.name} has sha256" in said[1]
        else:
            assert said == []


def share_of_checks(out: Path) -> list[str]:
    from ziphius.training import state

    run, seen = spread({}), list[str]()
    plain = state.check_manifest

    def check(folder: Path, only: list[str]) -> None:
        seen.extend(only)
        plain(folder, only=only)

    state.check_manifest = check  # type: ignore[assignment]
    try:
        state.open_checkpoint(out, run.saver.axis)
    finally:
        state.check_manifest = plain
    return seen


def test_ranks_share_the_reading_of_checksums(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, written, tmp_path)
    shares = pool.run(3, share_of_checks, tmp_path / "step-4")
    folder = tmp_path / "step-4"
    files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    assert sorted(name for own in shares for name in own) == sorted(set(files) - {"manifest.json"})
    sizes = [sum((folder / name).stat().st_size for name in own) for own in shares]
    assert max(sizes) < 1.3 * min(sizes)
