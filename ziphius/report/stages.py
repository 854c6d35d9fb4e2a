"""The later stages of a quickstart, side by side: what each is for, in held-out figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter

from ziphius.report.formats import duration
from ziphius.report.read import Run, finite
from ziphius.report.style import (
    BLUE,
    FONT,
    GREEN,
    MUTED,
    OLIVE,
    ORANGE,
    PURPLE,
    SMALL,
    Key,
    Panel,
    fit,
    new_figure,
)

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, OLIVE)


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


def length_panel(run: Run) -> Panel | None:
    """Right answers against their length, by task: a line from each stage to the next.

    Of tasks that all stages with lengths have measured; None where there are fewer than two stages
    or no task.
    """
    stages = (run.summary or {}).get("stages")
    if not isinstance(stages, Mapping):
        return None
    figures = {str(n): s for n, s in stages.items() if isinstance(s, Mapping) and s.get("lengths")}
    lines = _lines(list(figures.values()))
    if len(figures) < 2 or not lines:
        return None
    figure, axes = new_figure(SMALL)
    keys = []
    for (task, (xs, ys)), colour in zip(lines.items(), cycle(_COLOURS), strict=False):
        axes.plot(xs, ys, color=colour, linewidth=1.6)
        axes.plot(xs[:1], ys[:1], "o", color=colour, markersize=7, markerfacecolor="none")
        axes.plot(xs[1:], ys[1:], "o", color=colour, markersize=4)
        keys.append(Key(colour, "thick", task))
    axes.set_xlim(0, 1.06 * max(max(xs) for xs, _ in lines.values()))
    axes.set_xlabel("tokens an answer", fontsize=FONT, color=MUTED)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    fit(axes, np.array([0.0, 1.0]), room=0.05)
    return Panel(
        "accuracy-length", "Right answers and their length", "held out", figure,
        tuple(keys), f"From {', then '.join(figures)}: the ring is the first.", by="length",
    )  # fmt: skip


def _lines(figures: list[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Return lengths and shares, stage by stage, of the tasks that have both everywhere."""
    found = {}
    for task in _names(figures, "accuracy"):
        lengths, shares = ([_of(f, key, task) for f in figures] for key in ("lengths", "accuracy"))
        xs, ys = ([x for x in values if x is not None] for values in (lengths, shares))
        if len(xs) == len(ys) == len(figures):
            found[task] = (xs, ys)
    return found


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
