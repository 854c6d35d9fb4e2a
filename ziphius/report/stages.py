"""The later stages of a quickstart, side by side: what each is for, in held-out figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ziphius.report.formats import duration
from ziphius.report.read import Run, finite


@dataclass(frozen=True)
class StageTable:
    """Columns are stages, in their order; a row is a figure of every stage that has it."""

    stages: tuple[str, ...]
    rows: tuple[StageRow, ...]


@dataclass(frozen=True)
class StageRow:
    """One figure: its name, what every stage has of it, and shares of the cells to be shaded."""

    name: str
    cells: tuple[str, ...]
    shares: tuple[float, ...]


_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("seconds", "training", duration),
    ("heldout_bpb_before", "held-out bits per byte, before", "{:.3f}".format),
    ("heldout_bpb_after", "held-out bits per byte, after", "{:.3f}".format),
    ("mtp_agreement", "drafts of the MTP module that stand", "{:.0%}".format),
    ("length", "tokens an answer", "{:.1f}".format),
    ("kept", "answers kept of the expert's", "{:.0f}".format),
)


def stage_table(run: Run) -> StageTable | None:
    """Return the table of a run whose summary has ``stages``, else None."""
    stages = (run.summary or {}).get("stages")
    if not isinstance(stages, Mapping) or len(stages) < 2:
        return None
    figures = [stage if isinstance(stage, Mapping) else {} for stage in stages.values()]
    return StageTable(tuple(map(str, stages)), tuple(_rows(figures)))


def _rows(figures: list[Mapping[str, Any]]) -> Iterator[StageRow]:
    for task in _names(figures, "accuracy"):
        yield _shares(f"right answers, {task}", [_of(f, "accuracy", task) for f in figures])
    for name in _names(figures, "needles"):
        yield _shares(f"needles found, {name}", [_of(f, "needles", name) for f in figures])
    for key, name, form in _FIGURES:
        numbers = [finite(figure.get(key)) for figure in figures]
        if any(number is not None for number in numbers):
            cells = tuple("" if number is None else form(number) for number in numbers)
            yield StageRow(name, cells, (0.0,) * len(cells))


def _shares(name: str, values: list[float | None]) -> StageRow:
    cells = tuple("" if value is None else f"{value:.0%}" for value in values)
    return StageRow(name, cells, tuple(value or 0.0 for value in values))


def _names(figures: list[Mapping[str, Any]], key: str) -> list[str]:
    found: dict[str, None] = {}
    for figure in figures:
        if isinstance(figure.get(key), Mapping):
            found |= dict.fromkeys(figure[key])
    return list(found)


def _of(figure: Mapping[str, Any], key: str, name: str) -> float | None:
    values = figure.get(key)
    return finite(values.get(name)) if isinstance(values, Mapping) else None
