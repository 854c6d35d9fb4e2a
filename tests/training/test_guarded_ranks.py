"""What the guard decides over several ranks, and which of them is slow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.pool import Pool
from tests.training.support import Silent, metrics
from tests.training.support import recipe as small_recipe
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.training import loop
from ziphius.training import run as training_run
from ziphius.training.folder import RunFolder
from ziphius.training.run import pretrain
from ziphius.training.stragglers import Stragglers

SETTINGS = (
    *("precision.compute=float64", "run.checkpoint_every=2", "pretrain.steps=14"),
    *("guard.patience=3", "pretrain.micro_batch_size=1", "pretrain.ema_decay=null"),
)
# Of the steps that are tried these go wrong: one alone, and as many in a row as patience has. A
# spike needs losses before it.
WRONG = {"gradient": (2, 6, 7, 8), "loss": (2, 6, 7, 8), "spike": (12,)}


def run(text: Path, out: Path, *more: str) -> tuple[dict[str, Any], list[str]]:
    recipe = small_recipe(text, *SETTINGS, *more)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    mesh, watch = make_mesh(Layout.of(recipe.parallel, world)), Silent()
    summary = pretrain(recipe, RunFolder(out), watch, mesh=mesh).summary
    return summary, watch.said


@contextmanager
def steps_with(change: Callable[[Any, Any, int], None]) -> Iterator[None]:
    """Call something before every step, with the model's passes, the optimizer and its number."""
    plain, number = loop.train_step, 0

    def train_step(passes: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        change(passes, optimizer, number)
        return plain(passes, optimizer, *args, **kwargs)

    peak = training_run.peak_flops
    loop.train_step = train_step
    training_run.peak_flops = lambda device, dtype: 1e9  # what it measures takes long
    try:
        yield
    finally:
        loop.train_step, training_run.peak_flops = plain, peak


def spoiled(place: int, what: str, text: Path, out: Path, *more: str) -> Any:
    """Train, and let gradients or losses of one rank go wrong."""

    hooks: list[Any] = []

    def change(passes: Any, optimizer: Any, number: int) -> None:
        wrong = number in WRONG[what] and passes.mesh.rank == place
        run_passes = type(passes).run

        def spoil_loss(*args: Any) -> Any:
            result = run_passes(passes, *args)
            result.sums += 50.0 if what == "spike" else math.nan
            return result

        while hooks:
            hooks.pop().remove()
        passes.run = lambda *args: run_passes(passes, *args)
        if wrong and what == "gradient":
            # Of a norm: an expert may see no token. In backward: behind it gradients travel.
            norm = next(w for part in passes.models for w in part.parameters() if w.dim() == 1)
            hooks.append(norm.register_hook(lambda gradient: gradient + math.inf))
        elif wrong:
            passes.run = spoil_loss

    with steps_with(change):
        return run(text, out, *more)


@pytest.mark.parametrize(
    ("what", "layout"),
    [
        ("gradient", ["parallel.ep=2"]),
        ("gradient", ["parallel.pp=2"]),
        ("loss", ["parallel.ep=2"]),
    ],
)
def test_what_goes_wrong_on_one_rank_is_skipped_on_all_and_all_go_back(
    what: str, layout: list[str], pool: Pool, words: Path, tmp_path: Path
) -> None:
    expected, _ = spoiled(0, what, words, tmp_path / "alone")
    results = pool.run(2, spoiled, 1, what, words, tmp_path / "many", *layout)
    for summary, _ in results:
        assert (summary["skipped_steps"], summary["rollbacks"]) == (4, 1)
        assert summary["final_loss"] in (None, pytest.approx(expected["final_loss"], rel=1e-9))
    said = results[0][1]
    assert "the last 3 steps up to 8 could not be applied: going back to step-6, on with newer" in (
        " ".join(said)
    )
    lines = metrics(tmp_path / "many")
    assert {line["skipped"] for line in lines} == {None, f"{what} not finite"}
    for found, alone in zip(lines, metrics(tmp_path / "alone"), strict=True):
        assert (found["step"], found["skipped"]) == (alone["step"], alone["skipped"])
        if None in (found["loss"], alone["loss"]):
            assert found["skipped"] == "loss not finite"
        else:
            assert found["loss"] == pytest.approx(alone["loss"], rel=1e-9)


def test_a_spike_on_one_rank_is_skipped_on_all(pool: Pool, words: Path, tmp_path: Path) -> None:
    expected, _ = spoiled(0, "spike", words, tmp_path / "alone")
    results = pool.run(2, spoiled, 1, "spike", words, tmp_path / "many", "parallel.ep=2")
    for summary, _ in results:
        assert (summary["skipped_steps"], summary["rollbacks"]) == (1, 0)
    lines = metrics(tmp_path / "many")
    assert [line["step"] for line in lines if line["skipped"]] == [12]
    assert "nats above the median" in lines[11]["skipped"]
    assert lines[-1]["loss"] == pytest.approx(expected["final_loss"], rel=1e-9)


# Slow ranks


def slowed(place: int, text: Path, out: Path) -> list[str]:
    def change(passes: Any, optimizer: Any, number: int) -> None:
        time.sleep(0.1 if passes.mesh.rank == place else 0)

    with steps_with(change):
        return run(text, out, "pretrain.steps=24", "run.checkpoint_every=100", "parallel.ep=2")[1]


def test_a_slow_rank_is_named(pool: Pool, words: Path, tmp_path: Path) -> None:
    said, *others = pool.run(2, slowed, 1, words, tmp_path / "run")
    [told] = [line for line in said if "is slow" in line]
    assert told.startswith("rank 1 is slow: in the last 20 steps the others waited ")
    assert others == [[]]


def record(step: int, slowest: int, waited: float, least: float) -> dict[str, Any]:
    return {"step": step, "slowest_rank": slowest, "waited": waited, "waited_least": least}


def followed(records: list[dict[str, Any]]) -> list[str]:
    watch = Silent()
    stragglers = Stragglers(4, watch)
    for line in records:
        stragglers.step(line, 1.0)
    return watch.said


def test_only_who_stays_slow_is_named_and_not_at_every_step() -> None:
    # Three ranks wait 0.5 s of a second more than the one.
    slow = [record(step, 2, 0.475, 0.1) for step in range(1, 700)]
    said = "rank 2 is slow: in the last 20 steps the others waited 50% of the time for it"
    assert followed(slow[:19]) == []
    assert followed(slow[:500]) == [said]
    assert followed(slow) == [said] * 2
    assert followed([record(step, step % 4, 0.475, 0.1) for step in range(100)]) == []
    assert followed([record(step, 2, 0.2, 0.1) for step in range(100)]) == []
    moved = [record(step, 3, 0.475, 0.1) for step in range(21, 41)]
    first, *later = followed([*slow[:20], *moved])
    assert (first, [line[:6] for line in later]) == (said, ["rank 3"])
