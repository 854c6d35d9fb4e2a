"""However often a run is interrupted, and however it is set up, it is the run that never was."""

from __future__ import annotations

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

from tests.training.support import Silent, assert_same_run, metrics, recipe, write_text
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


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("words") / "text")


class Dropped(Exception):
    """Stands for whatever ends a process without a word."""


def train(out: Path, text: Path, values: tuple[str, ...], *, lines: int = 0, ask: int = 0) -> bool:
    """Train until ``lines`` lines of metrics are written, or a signal after ``ask`` of them.

    Returns whether the run ended.
    """
    written = asked = 0

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
        pretrain(recipe(text, *values), folder, Silent(on_step), stopping=stopping)
    except (Dropped, Stopped):
        return False
    return True


@pytest.fixture(scope="module")
def whole_runs(
    text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[str, ...]], Path]:
    """Runs that nothing interrupts, made once for each set of settings."""
    made: dict[tuple[str, ...], Path] = {}

    def whole(values: tuple[str, ...]) -> Path:
        if values not in made:
            made[values] = tmp_path_factory.mktemp("whole") / "run"
            assert train(made[values], text, values)
        return made[values]

    return whole


@settings(max_examples=12)
@given(
    every=st.integers(1, STEPS + 1),
    keep=st.integers(2, 4),
    validate=st.integers(0, 4),
    workers=st.sampled_from([0, 2]),
    # How far each attempt comes: that it is dropped, or that it is asked to stop.
    attempts=st.lists(st.tuples(st.integers(1, STEPS), st.booleans()), min_size=1, max_size=3),
)
def test_any_interruptions_of_any_run_change_nothing(
    text: Path,
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
        train(
            *(out, text, (*values, f"data.workers={workers}")),
            **({"ask": lines} if is_asked else {"lines": lines}),
        )
        if is_asked:  # a step that is saved because of a signal
            (record := metrics(out)[-1])
    assert train(out, text, (*values, f"data.workers={workers}"))
    assert_same_run(out, whole_runs(values), same_steps=not any(asked for _, asked in attempts))
    shutil.rmtree(out)
