"""How every picture of a report looks: few colours, thin axes, no box."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ziphius.report.formats import short, tidy

# Colours of Okabe and Ito and of Tol, which differ for every common kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, OLIVE = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#7a6a00"
INK, MUTED, AXIS, GRID = "#222222", "#5f6368", "#8a8f94", "#e4e5e7"
# In a page each of them is a variable of its style sheet, which a dark screen sets anew.
NAMES = {
    BLUE: "blue", ORANGE: "orange", GREEN: "green", PURPLE: "purple", OLIVE: "olive",
    INK: "ink", MUTED: "muted", AXIS: "axis", GRID: "grid",
}  # fmt: skip

SMALL, WIDE, NARROW = (400.0, 226.0), (1200.0, 410.0), (400.0, 300.0)  # in units of the page
FONT = 11.0

Mark = Literal["thick", "dash", "dotted", "dot", "ring", "skip"]


@dataclass(frozen=True)
class Key:
    """An entry of a picture's legend, which the page writes under the title."""

    colour: str
    mark: Mark
    text: str

    @property
    def name(self) -> str:
        """The colour as the style sheet calls it, or the colour itself."""
        return f"var(--{NAMES[self.colour]})" if self.colour in NAMES else self.colour


@dataclass(frozen=True)
class Panel:
    """One picture of the page: title, legend, a note below, and the figure in one or two shapes.

    ``narrow`` stands in for ``figure`` on a narrow screen; ``bare_keys`` of the legend are what
    the wide figure does not write beside its lines itself. ``by`` names the horizontal axis.
    """

    name: str
    title: str
    unit: str
    figure: Figure
    keys: tuple[Key, ...] = ()
    note: str = ""
    narrow: Figure | None = None
    bare_keys: tuple[Key, ...] = ()
    by: str = "step"


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with matplotlib's own defaults, whatever a user's configuration says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def new_figure(
    size: tuple[float, float],
    left: float = 46,
    right: float = 10,
    top: float = 8,
    bottom: float = 36,
    font: float = FONT,
) -> tuple[Figure, Axes]:
    """Return an empty figure of ``size`` units and its axes, with margins in units."""
    width, height = size
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width,
         (height - top - bottom) / height)
    )  # fmt: skip
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(AXIS)
    axes.tick_params(colors=MUTED, labelsize=font, length=3.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    ticks = 5 if height < 350 else 8
    axes.yaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tidy(value)))
    return figure, axes


def step_axis(axes: Axes, first: float, last: float, ticks: int = 5) -> None:
    """Make the horizontal axis one of optimizer steps."""
    room = 0.012 * (last - first) or 1.0
    axes.set_xlim(first - room, last + room)
    axes.set_xlabel("step", fontsize=axes.xaxis.get_ticklabels()[0].get_fontsize(), color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: short(step)))


def fit(axes: Axes, values: np.ndarray, *, low: float | None = None, room: float = 0.07) -> None:
    """Set the vertical limits around the finite ``values``, from ``low`` if given."""
    present = values[np.isfinite(values)]
    if not len(present):
        return
    bottom, top = float(present.min()), float(present.max())
    span = (top - bottom) or abs(top) or 1.0
    axes.set_ylim(bottom - room * span if low is None else low, top + room * span)


def logarithmic(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with few labels."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tidy(value)))
