"""What several pictures share: a column as a thin and a thick line, and the marks of events."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from ziphius.report.read import Metrics, Run
from ziphius.report.series import Floats, extremes
from ziphius.report.style import AXIS, INK, Key

_MARKS = 200
_PARTS = 60


def draw_curve(axes: Axes, metrics: Metrics, name: str, colour: str, points: int) -> None:
    """Draw a column, thin by step and thick smoothed."""
    steps = metrics.steps.astype(np.float64)
    thin = extremes(steps, metrics.columns[name], points)
    thick = extremes(steps, metrics.average(name), points)
    dots = "o" if len(thin[0]) < 3 else ""  # one point makes no line
    axes.plot(*thin, color=colour, linewidth=0.7, alpha=0.4, zorder=2)
    axes.plot(
        *thick,
        color=colour,
        linewidth=1.9,
        zorder=3,
        solid_capstyle="round",
        marker=dots,
        markersize=3,
    )


def draw_abandoned(axes: Axes, metrics: Metrics, name: str) -> None:
    """Draw the steps that the run went back from."""
    steps, values = metrics.abandoned[name]
    # One line for every return: a step that is not above the last begins another.
    for part in np.split(np.arange(len(steps)), np.flatnonzero(np.diff(steps) <= 0) + 1):
        axes.plot(*extremes(steps[part], values[part], 400), color=AXIS, linewidth=0.9, zorder=1.5)


def limits(values: Floats) -> Floats:
    """Return the lowest and the highest value to show: a lone peak far above is cut off.

    What is usual is the first value, and the median of every sixtieth of the curve.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return values
    parts = np.array_split(values, min(len(values), _PARTS))
    usual, bottom = max(values[0], *(np.median(part) for part in parts)), values.min()
    edge = usual + 0.35 * (usual - bottom or abs(usual))
    return np.array([bottom, min(values.max(), edge)])


def mark_events(axes: Axes, run: Run) -> None:
    """Mark skipped steps at the top edge, and where the run went back, on a finished step axis."""
    first, last = axes.get_xlim()
    skipped = sorted({skip.step for skip in run.metrics.skips if first <= skip.step <= last})
    shown = skipped[:: max(1, -(-len(skipped) // _MARKS))]
    if shown:
        axes.plot(
            shown, [1.0] * len(shown), "v", color=INK, markersize=4.5, zorder=6, clip_on=False,
            markeredgewidth=0, transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    for rollback in run.metrics.rollbacks:
        if first <= rollback.step <= last:
            axes.axvline(rollback.step, color=INK, linewidth=1.0, linestyle=(0, (1.5, 2)), zorder=1)


def event_keys(run: Run) -> tuple[Key, ...]:
    """Return what the marks of ``mark_events`` mean."""
    keys, metrics = [], run.metrics
    if metrics.skips:
        keys.append(Key(INK, "skip", "skipped step"))
    if metrics.rollbacks:
        keys.append(Key(INK, "dotted", "went back to a checkpoint"))
    if metrics.replaced:
        keys.append(Key(AXIS, "thick", "steps that were made again"))
    return tuple(keys)
