"""What several pictures share: a column as a thin and a thick line, and the marks of events."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from ziphius.report.read import Metrics, Run
from ziphius.report.series import Floats, extremes
from ziphius.report.style import AXIS, INK, Key

_MARKS = 200


def draw_curve(
    axes: Axes, metrics: Metrics, name: str, colour: str, points: int
) -> tuple[Floats, Floats]:
    """Draw a column, thin by step and thick smoothed; return both lines' values."""
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
    return thin[1], thick[1]


def draw_abandoned(axes: Axes, metrics: Metrics, name: str) -> list[Floats]:
    """Draw the steps that the run went back from; return what decides the picture's height."""
    steps, values = metrics.abandoned[name]
    if not np.isfinite(values).any():
        return []
    # One line for every return: a step that is not above the last begins another.
    for part in np.split(np.arange(len(steps)), np.flatnonzero(np.diff(steps) <= 0) + 1):
        axes.plot(*extremes(steps[part], values[part], 400), color=AXIS, linewidth=0.9, zorder=1.5)
    kept = metrics.points(name)[1]
    return [limited(values[np.isfinite(values)], kept)] if len(kept) else []


def limited(thin: Floats, thick: Floats) -> Floats:
    """Return the values that decide a picture's height: a lone peak far above is cut off."""
    if not len(thick):
        return thin
    top, bottom = float(thick.max()), float(thick.min())
    edge = top + 0.35 * (top - bottom or abs(top))
    return np.append(np.minimum(thin, edge), thick)


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
