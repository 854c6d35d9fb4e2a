"""However often a run is interrupted, and however it is set up, it is the run that never was."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.support import Silent, assert_same_run, metrics, recipe
from ziphius.training import loop, run
from ziphius.training.folder import RunFolder
from ziphius.training.loop import Stopped
from ziphius.training.run import pretrain

STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def _known_peak() -> Iterator[None]:
    """Do not measure the machine in every run: it takes longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "peak_flops", lambda device, dtype: 1e9)
        yield


class Dropped(Exception):
    """Stands for whatever ends a process without a word."""


def train(out: Path, words: Path, values: tuple[str, ...], *, lines: int = 0, ask: int = 0) -> bool:
    """Train until ``lines`` lines of metrics are written, or a signal after ``ask`` of them.

    Returns whether the run ended.
    """
    written = 0

    def on_step(step: int) -> None:
        nonlocal written
        written += 1
        if written == lines:
            raise Dropped

    @contextmanager
    def stopping() -> Iterator[Callable[[], int]]:
        yield lambda: signal.SIGTERM if written == ask else 0

    try:
        folder = RunFolder(out, resume=True)
        pretrain(recipe(words, *values), folder, Silent(on_step), stopping=stopping)
    except (Dropped, Stopped):
        return False
    return True


@pytest.fixture(scope="module")
def whole_runs(
    words: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[str, ...]], Path]:
    """Runs that nothing interrupts, made once for each set of settings."""
    made: dict[tuple[str, ...], Path] = {}

    def whole(values: tuple[str, ...]) -> Path:
        if values not in made:
            made[values] = tmp_path_factory.mktemp("whole") / "run"
            assert train(made[values], words, values)
        return made[values]

    return whole


@settings(max_examples=6)
@given(
    every=st.integers(1, STEPS + 1),
    keep=st.integers(2, 4),
    validate=st.integers(0, 4),
    workers=st.sampled_from([0, 2]),
    # How far each attempt comes: that it is dropped, or that it is asked to stop.
    attempts=st.lists(st.tuples(st.integers(1, STEPS), st.booleans()), min_size=1, max_size=3),
)
def test_any_interruptions_of_any_run_change_nothing(
    words: Path,
    whole_runs: Callable[[tuple[str, ...]], Path],
    tmp_path_factory: pytest.TempPathFactory,
    every: int,
    keep: int,
    validate: int,
    workers: int,
    attempts: list[tuple[int, bool]],
) -> None:
    values = (
        f"pretrain.steps={STEPS}",
        f"run.checkpoint_every={every}",
        f"run.keep_checkpoints={keep}",
        f"run.validate_every={validate}",
    )
    out = tmp_path_factory.mktemp("run") / "run"
    for lines, is_asked in attempts:
        stop = {"ask" if is_asked else "lines": lines}
        train(out, words, (*values, f"data.workers={workers}"), **stop)
    assert train(out, words, values)
    # A signal saves steps that are saved in no other run.
    same_steps = not any(is_asked for _, is_asked in attempts)
    assert_same_run(out, whole_runs(values), same_steps=same_steps)
    shutil.rmtree(out)


@pytest.mark.parametrize("left", [0, 500])
def test_a_run_whose_metrics_are_lost_says_so_and_ends(
    left: int, words: Path, whole_runs: Callable[[tuple[str, ...]], Path], tmp_path: Path
) -> None:
    values = (f"pretrain.steps={STEPS}", "run.checkpoint_every=3")
    whole, out = whole_runs(values), tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "metrics.jsonl").write_bytes((out / "metrics.jsonl").read_bytes()[:left])
    watch = Silent()
    pretrain(recipe(words, *values), RunFolder(out, resume=True), watch)
    assert any("metrics.jsonl: lines of earlier steps are missing" in line for line in watch.said)
    summaries = [json.loads((path / "summary.json").read_text("utf-8")) for path in (out, whole)]
    assert summaries[0]["heldout_bpb_after"] == summaries[1]["heldout_bpb_after"]


# Everything at once

EVERYTHING = (
    *("pretrain.steps=null", "pretrain.tokens=1600", "pretrain.micro_batch_size=2"),
    *("pretrain.batch_size_start=2", "pretrain.batch_ramp_end=60%", "pretrain.batch_size=6"),
    *("pretrain.warmup_steps=2", "pretrain.decay_start=30%", "pretrain.decay_end=80%"),
    *("pretrain.last_learning_rate=1e-5", "pretrain.last_start=90%"),
    *("pretrain.bias_update_stop=50%", "pretrain.mtp_loss_weight_late=0.1"),
    *("pretrain.mtp_loss_weight_change=40%", "pretrain.balance_loss_choices=real"),
    *("data.document_mask=true", "data.fim_rate=0.5", "data.token_split_rate=0.5"),
    *("data.workers=2", "run.tensorboard=true", "run.checkpoint_every=3", "run.validate_every=4"),
)


def test_a_run_of_every_part_goes_on_from_anywhere(
    words: Path, whole_runs: Callable[[tuple[str, ...]], Path], tmp_path: Path
) -> None:
    whole = whole_runs(EVERYTHING)
    records = metrics(whole)
    for name in ("batch_size", "lr", "gamma", "mtp_weight"):
        assert len({record[name] for record in records}) > 1, f"{name} never changes"
    for lines in range(1, len(records) + 1, 4):
        out = tmp_path / str(lines)
        train(out, words, EVERYTHING, lines=lines)
        (events,) = (out / "tensorboard").iterdir()
        events.rename(events.with_name("events.out.tfevents.1"))  # as if long ago
        assert train(out, words, EVERYTHING)
        assert_same_run(out, whole)
        shown = shown_by_tensorboard(out)
        assert [step for step, _ in shown] == [record["step"] for record in records]
        losses = [record["loss"] for record in records]
        assert [loss for _, loss in shown] == pytest.approx(losses, rel=1e-6)  # they are float32


def shown_by_tensorboard(out: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars("loss")]


# Steps that go wrong


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the losses of some batches NaN: of the same ones, whenever they come."""
    plain = loop.train_step

    def train_step(passes: Any, optimizer: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if batch.tokens_BS.sum() % 5 > 3:
            return plain(passes, optimizer, batch, *args, **kwargs)
        (model,) = passes.models
        saved = model.norm.weight.detach().clone()
        with torch.no_grad():
            model.norm.weight.fill_(math.nan)
        result = plain(passes, optimizer, batch, *args, **kwargs)
        with torch.no_grad():
            model.norm.weight.copy_(saved)
        return result

    monkeypatch.setattr(loop, "train_step", train_step)


@pytest.mark.parametrize("every", [2, 3])
def test_a_run_that_skips_and_goes_back_is_the_same_however_it_is_interrupted(
    every: int, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    values = (
        *("pretrain.steps=8", f"run.checkpoint_every={every}", "guard.patience=2"),
        "guard.max_rollbacks=50",
    )
    whole = tmp_path / "whole"
    assert train(whole, words, values)
    records = metrics(whole)
    assert records[-1]["rollbacks"] > 1, "the batches have to be bad enough"
    assert sum(record["skipped"] is None for record in records) > 2
    for lines in range(1, len(records) + 1):
        stop = {"lines" if lines % 2 else "ask": lines}
        out = tmp_path / str(lines)
        train(out, words, values, **stop)
        assert train(out, words, values)
        assert metrics(out) == records, stop
