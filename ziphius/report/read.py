"""A run as its files tell it; nothing else is asked.

A run that was broken off is still a run: files that it has not written are absent here, lines that
cannot be read are left out, and ``notes`` says so. Where a run went back (a resume or a rollback),
the steps that it made again replace the ones before: the last line of a step counts, and steps
after the place it went back to are no part of the run.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ziphius.config.errors import BadInput
from ziphius.report.balance import Balance, read_balance
from ziphius.report.needle import NEEDLE, Needles, read_needles
from ziphius.report.series import Floats, Ints, half_window, smooth

METRICS, BALANCE, SUMMARY, RECIPE = (
    "metrics.jsonl", "balance.jsonl", "summary.json", "recipe.toml",
)  # fmt: skip
NUMBERS = (
    "tokens", "seconds", "loss", "mtp_loss", "balance_loss", "total_loss", "bpb", "mtp_bpb", "lr",
    "batch_size", "gamma", "mtp_weight", "tokens_per_s", "mfu", "grad_norm", "max_violation",
    "rollbacks", "heldout_bpb", "mtp_agreement", "heldout_bpb_ema",
    "reward", "accuracy", "length", "entropy", "kl", "mismatch",
)  # fmt: skip


@dataclass(frozen=True)
class Skip:
    """A step whose update was not applied. ``replaced``: the run went back and made it again."""

    step: int
    reason: str
    replaced: bool


@dataclass(frozen=True)
class Rollback:
    """The first step after the run went back, and the last one before if the file still has it."""

    step: int
    left: int | None


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl by column, in the order of steps; a value that a line lacks is NaN.

    ``abandoned`` has loss and bits per byte of the steps that the run went back from, in the
    order in which they were made: steps and values.
    """

    steps: Ints
    columns: Mapping[str, Floats]
    applied: np.ndarray[Any, np.dtype[np.bool_]]
    skips: tuple[Skip, ...]
    rollbacks: tuple[Rollback, ...]
    abandoned: Mapping[str, tuple[Floats, Floats]]

    def has(self, name: str) -> bool:
        """Say whether any line has a finite number under this name."""
        return bool(np.isfinite(self.columns[name]).any())

    def points(self, name: str) -> tuple[Floats, Floats]:
        """Return steps and values of the lines that have the number."""
        present = np.isfinite(self.columns[name])
        return self.steps[present].astype(np.float64), self.columns[name][present]

    @property
    def replaced(self) -> int:
        """How many lines the run went back from."""
        return len(self.abandoned["loss"][0])

    def average(self, name: str) -> Floats:
        """Return the smooth line of a column. A step that was not applied takes no part in it."""
        values = np.where(self.applied, self.columns[name], np.nan)
        return smooth(values, half_window(len(values)))

    def last(self, name: str) -> float | None:
        """Return the newest number under this name."""
        values = self.points(name)[1]
        return float(values[-1]) if len(values) else None


@dataclass(frozen=True)
class Run:
    """Everything that a run's folder says. ``summary`` is None while a run has not finished."""

    name: str
    metrics: Metrics
    balance: Balance | None
    summary: Mapping[str, Any] | None
    recipe: Mapping[str, Any] | None
    notes: tuple[str, ...]
    needles: Needles | None = None

    def number(self, name: str) -> float | None:
        """Return a finite number of the summary, or None."""
        return finite((self.summary or {}).get(name))

    def text(self, name: str) -> str | None:
        """Return a text of the summary, or None."""
        value = (self.summary or {}).get(name)
        return value if isinstance(value, str) and value else None

    def setting(self, table: str, key: str) -> Any:
        """Return a setting of the recipe, or None."""
        values = (self.recipe or {}).get(table)
        return values.get(key) if isinstance(values, dict) else None

    def heldout(self, name: str = "heldout_bpb") -> tuple[Floats, Floats] | None:
        """Return steps and bits per byte of held-out text, the summary's at the ends; or None.

        ``heldout_bpb_ema`` is the same of the averaged weights.
        """
        steps, values = (list(part) for part in self.metrics.points(name))
        before, after = self.number(f"{name}_before"), self.number(f"{name}_after")
        if name == "heldout_bpb_ema":
            after = self.number(name)
        if before is not None:
            steps, values = [0.0, *steps], [before, *values]
        last = float(self.metrics.steps[-1])
        if after is not None:
            if steps and steps[-1] == last:
                steps, values = steps[:-1], values[:-1]
            steps, values = [*steps, last], [*values, after]
        return (np.array(steps), np.array(values)) if steps else None

    def is_mtp(self, layer: int) -> bool:
        """Say whether a layer is one of the multi-token prediction modules."""
        listed = (self.summary or {}).get("mtp_layers")
        if isinstance(listed, list):
            return layer in listed
        main = self.setting("model", "num_hidden_layers")
        return isinstance(main, int) and layer >= main


def finite(value: Any) -> float | None:
    """Return a JSON value as a number, or None if it is none or not finite."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises BadInput, one line, for a folder that holds no run."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise BadInput(f"{folder}: {what}: give the folder of a run")
    if not (folder / METRICS).is_file():
        raise BadInput(f"{folder}: holds no {METRICS}, so it is no run: give the folder of a run")
    notes: list[str] = []
    metrics = read_metrics(folder / METRICS, notes)
    if not len(metrics.steps):
        raise BadInput(f"{folder / METRICS}: no step is written there yet: wait for the first")
    balance = None
    if (folder / BALANCE).is_file():
        balance = read_balance(folder / BALANCE, notes)
    return Run(
        name=folder.resolve().name,
        metrics=metrics,
        balance=balance,
        summary=_read_summary(folder / SUMMARY),
        recipe=_read_recipe(folder / RECIPE),
        notes=tuple(notes),
        needles=read_needles(folder / NEEDLE),
    )


def read_metrics(path: Path, notes: list[str]) -> Metrics:
    """Read a file of metrics, adding to ``notes`` what had to be left out.

    A line counts if it is a JSON object with an integer ``step``. Raises BadInput for a file that
    cannot be read at all.
    """
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        raise BadInput(f"metrics {path}: cannot be read: {error.strerror}") from None
    kept: list[dict[str, Any]] = []
    rollbacks: list[Rollback] = []
    unreadable: list[int] = []
    gone: list[dict[str, Any]] = []
    before = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            unreadable.append(number)
            continue
        if before is not None and _count(record) > _count(before):
            left = before["step"] if before["step"] >= record["step"] else None
            rollbacks.append(Rollback(record["step"], left))
        first = len(kept)
        while first and kept[first - 1]["step"] >= record["step"]:
            first -= 1
        gone += kept[first:]
        kept[first:] = [record]
        before = record
    _tell_unreadable(unreadable, len(lines), notes)
    skips = [
        Skip(record["step"], str(record["skipped"]), replaced)
        for records, replaced in ((gone, True), (kept, False))
        for record in records
        if record.get("skipped")
    ]
    gone_steps = np.array([record["step"] for record in gone], np.float64)
    return Metrics(
        steps=np.array([record["step"] for record in kept], np.int64),
        columns={name: _column(kept, name) for name in NUMBERS},
        applied=np.array([not record.get("skipped") for record in kept], bool),
        skips=tuple(sorted(skips, key=lambda skip: skip.step)),
        rollbacks=tuple(rollbacks),
        abandoned={name: (gone_steps, _column(gone, name)) for name in ("loss", "bpb")},
    )


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record


def _count(record: Mapping[str, Any]) -> float:
    return finite(record.get("rollbacks")) or 0.0


def _column(records: list[dict[str, Any]], name: str) -> Floats:
    values = [record.get(name) for record in records]
    if not set(map(type, values)) <= {float, int, type(None)}:
        values = [finite(value) for value in values]
    column = np.array(values, np.float64)  # None becomes NaN
    column[np.isinf(column)] = np.nan
    return column


def _tell_unreadable(numbers: list[int], lines: int, notes: list[str]) -> None:
    # A file that ends with its last line ends with an empty piece.
    if numbers and numbers[-1] == lines:
        notes.append(f"{METRICS}: the last line, {lines}, is cut off and left out.")
        numbers = numbers[:-1]
    if numbers:
        shown = ", ".join(str(number) for number in numbers[:5])
        more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
        notes.append(f"{METRICS}: cannot be read and left out: line {shown}{more}.")


def _read_summary(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path}: cannot be read ({error}): move it away for a report without it"
        ) from None
    if not isinstance(summary, dict):
        raise BadInput(f"{path}: not a JSON object: move it away for a report without it")
    return summary


def _read_recipe(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path}: cannot be read ({error}): move it away for a report without it"
        ) from None
