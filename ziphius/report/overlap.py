"""An overlapped program as a picture: what a rank computes, and what travels meanwhile.

Colours are those of ``pipeline.py``: forward, backward for the input, backward for weights. What is
free of a line is time in which the rank waits, or nothing travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ziphius.config.errors import BadInput
from ziphius.report.picture import write_picture
from ziphius.report.pipeline import ink, shade
from ziphius.report.style import AXIS, BLUE, INK, MUTED, OLIVE, ORANGE

COLOURS = {"F": BLUE, "B": ORANGE, "W": OLIVE}
NAMES = {"F": "forward", "B": "backward for the input", "W": "backward for weights"}
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1200.0, 96.0, 12.0, 62.0, 34.0
ROW, GAP, BETWEEN = 34.0, 6.0, 22.0  # of a line; between two programs, in points
FONT, LETTER = 8.0, 4.9


class Span(NamedTuple):
    """Something on one of a program's lines; times are in seconds."""

    line: int  # 0: computed, 1: communicated
    direction: str  # F, B or W
    text: str
    start: float
    stop: float


class Program(NamedTuple):
    """A name, and what it does."""

    name: str
    spans: Sequence[Span]


def draw_overlap(programs: Sequence[Program], output: Path, *, title: str, note: str = "") -> None:
    """Draw programs below each other as SVG or PNG, as the file's name says.

    Raises BadInput for another ending or for nothing to draw.
    """
    if not any(program.spans for program in programs):
        raise BadInput("a program without events cannot be drawn")
    make = partial(overlap_figure, programs, title, note)
    write_picture(output, "a timeline", title, make)


def overlap_figure(programs: Sequence[Program], title: str, note: str = "") -> Figure:
    """Return what ``draw_overlap`` draws, before it becomes a file."""
    lines = 2 * ROW * len(programs) + BETWEEN * (len(programs) - 1)
    height = lines + TOP + BOTTOM
    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="white")
    inner = WIDTH - LEFT - RIGHT
    axes = figure.add_axes(
        (LEFT / WIDTH, BOTTOM / height, inner / WIDTH, lines / height), facecolor="white"
    )
    end = max(span.stop for program in programs for span in program.spans)
    axes.set_xlim(0, end * 1e3)
    axes.set_ylim(lines, 0)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.tick_params(axis="x", length=3, color=AXIS)
    axes.set_xlabel("milliseconds", fontsize=9, color=MUTED, labelpad=1)
    ticks, names = [], []
    for number, program in enumerate(programs):
        top = number * (2 * ROW + BETWEEN)
        ticks += [top + ROW / 2, top + ROW * 1.5]
        names += ["computes", "communicates"]
        _draw(axes, program, top, end * 1e3, inner)
        figure.text(LEFT / WIDTH, 1 - (TOP + top - 4) / height, program.name, fontsize=9, color=INK)
    axes.set_yticks(ticks, names)
    figure.text(LEFT / WIDTH, 1 - 18 / height, title, fontsize=12, color=INK, weight="bold")
    figure.text(1 - RIGHT / WIDTH, 1 - 18 / height, note, fontsize=9.5, color=MUTED, ha="right")
    _legend(figure, height)
    return figure


def _draw(axes: Axes, program: Program, top: float, end: float, inner: float) -> None:
    for line in (0, 1):
        axes.add_patch(
            Rectangle(
                (0, top + line * ROW + GAP / 2), end, ROW - GAP, facecolor="#f3f4f5", linewidth=0
            )
        )
    for span in program.spans:
        start, stop = span.start * 1e3, span.stop * 1e3
        colour = shade(COLOURS[span.direction], 1 - span.line, 2)
        corner = (start, top + span.line * ROW + GAP / 2)
        axes.add_patch(
            Rectangle(
                corner, stop - start, ROW - GAP, facecolor=colour, edgecolor="white", linewidth=0.6
            )
        )
        if (stop - start) * inner / end > len(span.text) * LETTER + 3:
            axes.text(
                (start + stop) / 2, top + (span.line + 0.5) * ROW, span.text, color=ink(colour),
                fontsize=FONT, ha="center", va="center_baseline",
            )  # fmt: skip


def _legend(figure: Figure, height: float) -> None:
    left = LEFT
    for direction, name in NAMES.items():
        for line in (0, 1):
            corner = ((left + 8 * line) / WIDTH, 1 - 40 / height)
            colour = shade(COLOURS[direction], 1 - line, 2)
            figure.add_artist(Rectangle(corner, 8 / WIDTH, 9 / height, facecolor=colour))
        figure.text((left + 21) / WIDTH, 1 - 39 / height, name, fontsize=9, color=INK)
        left += 30 + 5.2 * len(name)
